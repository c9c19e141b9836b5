"""What a sentence-transformers folder has around its transformer, for a student that takes the transformer's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")


def copy_modules(teacher: str, student: Path) -> None:
    """Put the teacher's pooling and what follows it beside a student of the same width: SentenceTransformer loads it.

    Nothing is done where the teacher is no such folder, or has its transformer in a folder of its own.

    Args:
        teacher: where it is.
        student: the folder that the student is saved in.
    """
    source = Path(teacher).expanduser()
    if not (source / MODULES).is_file():
        return
    first, *others = json.loads((source / MODULES).read_text(encoding="utf-8"))
    if first["path"]:
        return
    for name in (MODULES, *SETTINGS):
        if (source / name).is_file():
            shutil.copy(source / name, student / name)
    for module in others:
        if (source / module["path"]).is_dir():  # what has no settings may have no folder
            shutil.copytree(source / module["path"], student / module["path"])
