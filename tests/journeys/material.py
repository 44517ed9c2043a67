"""Write the inputs of the journeys into a folder, from Python's language reference.

python -m tests.journeys.material FOLDER [CHARACTERS]
"""

import json
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_material(folder: Path, characters: int = 60_000) -> None:
    """Write text, a folder of texts, JSON lines, conversations and Parquet of that length each."""
    pages, size = [], 0
    for name in sorted(topics):
        if size >= characters:
            break
        pages.append(topics[name])
        size += len(topics[name])
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(pages)
    (folder / "notes.txt").write_text(text)
    (folder / "more.txt").write_text(text[: characters // 3])
    (folder / "notes").mkdir(exist_ok=True)
    for number, page in enumerate(pages):
        (folder / "notes" / f"page-{number:03d}.txt").write_text(page)
    paragraphs = [part.strip() for page in pages for part in page.split("\n\n")]
    paragraphs = [part for part in paragraphs if len(part) > 60]
    for name, field in (("pages.jsonl", "body"), ("text.jsonl", "text")):
        lines = [json.dumps({field: page}) for page in pages]
        (folder / name).write_text("\n".join(lines) + "\n")
    chats = [
        {"messages": [turn("user", f"Explain: {part[:40]}"), turn("assistant", part)]}
        for part in paragraphs
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pq.write_table(pa.table({"text": pages}), folder / "pages.parquet")
    shutil.copy(Path(__file__).with_name("notebook.py"), folder)


if __name__ == "__main__":
    write_material(Path(sys.argv[1]), *map(int, sys.argv[2:]))
