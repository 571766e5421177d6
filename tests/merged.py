"""A merge without proof or manifest, for tests of what is written."""

from pathlib import Path

from qlora_lite.files.staging import staged_folder
from qlora_lite.merging.write import MergeOptions, WriteResult, write_merged


def merge_adapter(
    base_dir: Path | str, adapter_dir: Path | str, out_dir: Path | str, *, options: MergeOptions = MergeOptions()
) -> WriteResult:
    """Write into `out_dir`, which must be missing or empty; an error leaves nothing behind."""
    with staged_folder(out_dir) as folder:
        return write_merged(base_dir, adapter_dir, folder, options)
