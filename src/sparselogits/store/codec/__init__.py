"""The coding of targets: the windows of a shard as blocks of bytes, and back."""

from sparselogits.store.codec.decoder import BlockDecoder
from sparselogits.store.codec.target_codec import TargetCodec, TargetWindow, codec_for

__all__ = ["BlockDecoder", "TargetCodec", "TargetWindow", "codec_for"]
