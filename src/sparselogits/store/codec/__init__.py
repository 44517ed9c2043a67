"""The coding of targets: the windows of a shard as blocks of bytes, and back."""

from sparselogits.store.codec.target_codec import BlockError, TargetCodec, TargetWindow, codec_for

__all__ = ["BlockError", "TargetCodec", "TargetWindow", "codec_for"]
