"""Encode the targets of windows as blocks of bytes, and decode them."""

from sparselogits.store.codec.decoder import BlockDecoder
from sparselogits.store.codec.target_codec import TargetCodec, TargetWindow, codec_for

__all__ = ["BlockDecoder", "TargetCodec", "TargetWindow", "codec_for"]
