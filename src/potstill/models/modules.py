"""Copy a sentence-transformers teacher's pooling beside a student that takes the place of its transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")


def copy_modules(teacher: str, student: Path) -> None:
    """Copy the teacher's modules behind its transformer, so that SentenceTransformer loads a student of its width.

    Nothing is copied where the teacher is not such a folder, or has its transformer in a subfolder.
    """
    source = Path(teacher).expanduser()
    if not (source / MODULES).is_file():
        return
    transformer, *others = json.loads((source / MODULES).read_text(encoding="utf-8"))
    if transformer["path"]:
        return
    for name in (MODULES, *SETTINGS):
        if (source / name).is_file():
            shutil.copy(source / name, student / name)
    for module in others:
        if (source / module["path"]).is_dir():  # a module without settings may have no folder
            shutil.copytree(source / module["path"], student / module["path"])
