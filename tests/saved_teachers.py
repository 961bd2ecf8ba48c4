"""Folders of saved teachers, and what must not be executed from them."""

from tiny_models import with_teachers

CONFIG, WEIGHTS, HEAD, HEAD_WEIGHTS = FILES = (
    "adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors"
)  # fmt: skip


class Executed(Exception):
    pass


def execute():
    raise Executed


class Evil:
    """Raises where a pickle of it is loaded."""

    def __reduce__(self):
        return execute, ()


def files_of_a_teacher(folder):
    with_teachers(teachers=["bank"]).save_adapter(str(folder / "bank"), "bank", use_safetensors=True)
    return {path.name: path.read_bytes() for path in (folder / "bank").iterdir()}


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
