"""Caption files as other programs write them."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq


def write(file, captions, column="caption"):
    """`captions` (str or None) as the kind that the suffix says, by another library than the one that reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = file.suffix[1:]
    if kind == "txt":
        file.write_bytes("".join(f"{c or ''}\n" for c in captions).encode())
    elif kind == "jsonl":
        ascii = len(captions) % 2 == 0
        lines = [json.dumps({"id": i, column: c}, ensure_ascii=ascii) for i, c in enumerate(captions)]
        file.write_bytes("\n".join(lines).encode())
    elif kind == "csv":
        with open(file, "w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerows([["id", column], *([i, c] for i, c in enumerate(captions))])
    else:
        pq.write_table(pa.table({"id": range(len(captions)), column: pa.array(captions, pa.string())}), file)
    return file


def make(folder, name, content):
    file = folder / name
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(content)
    return file
