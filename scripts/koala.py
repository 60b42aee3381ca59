"""Write a synthetic caption folder in the format of Koala-36M, and measure how fast it is read.

The CSV shards have a byte-order mark, quotes, newlines in captions, rows without caption and a truncated last line.

    python scripts/koala.py write FOLDER --rows 2000000      # 2.1 GB
    python scripts/koala.py measure FOLDER                   # time to the first batch, peak memory, prompts per second
"""

import argparse
import csv
import random
import resource
import time
from pathlib import Path

COLUMNS = [
    "videoID", "url", "timestamp", "caption", "clarity_score", "aesthetic_score", "motion_score",
    "video_training_suitability_score",
]  # fmt: skip
WORDS = "a bird turns over the water while soft light moves slowly across old stones and people walk by".split()


def koala_row(number: int, text: str) -> list[str]:
    """Row `number` of the folder; every 17th has no caption, some contain quotes, newlines or the word NA."""
    caption = f"clip {number}: {text}"
    if number % 17 == 3:
        caption = ("", "  ")[number % 2]
    elif number % 11 == 5:
        caption = caption.replace("the", '"the", said ""she""', 1) + "\nsecond line\r\nthird, 日本 é"
    elif number % 1000 == 6:
        caption = f"NA {number} for $5, or $$"
    suitability = "" if number % 19 == 1 else "0.5"
    scores = [f"{number * 37 % 100 / 100:.2f}", f"{4 + number % 3}", f"{number % 90 / 10}", suitability]
    return [f"v{number // 4}", f"https://example.org/{number}", f"['0:0:{number % 60}', '0:1:0']", caption, *scores]


def koala_texts(words: int) -> list[str]:
    draw = random.Random(0)
    pool = draw.choices(WORDS, k=20_000 + words)
    return [" ".join(pool[i : i + words]) for i in range(0, 20_000, 10)]


def write_koala(folder: Path, rows: int, shards: int = 10, words: int = 200) -> None:
    """Write `rows` rows, divided into `shards` files, and a last row that is truncated inside its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = koala_texts(words)
    for shard in range(shards):
        with open(folder / f"Koala_36M_{shard + 1}.csv", "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for number in range(rows * shard // shards, rows * (shard + 1) // shards):
                writer.writerow(koala_row(number, texts[number % len(texts)]))
            if shard == shards - 1:
                file.write(f'v{rows // 4},https://example.org/x,"[\'0:0:0\'","clip {rows}: the last, and then')


def measure(folder: Path, batches: int, batch_size: int, resume_at: int) -> None:
    started = time.perf_counter()
    from dimo.data.stream import PromptStream

    stream = PromptStream(folder)
    stream.take(batch_size)
    print(f"first batch of {batch_size}: {time.perf_counter() - started:.2f} s after the first import")
    since = time.perf_counter()
    for done in range(1, batches + 1):
        stream.take(batch_size)
        if done * batch_size >= resume_at and resume_at:
            state, resume_at = stream.state_dict(), 0
            clock = time.perf_counter()
            again = PromptStream(folder)
            again.load_state_dict(state)
            print(f"resume at prompt {done * batch_size}: {time.perf_counter() - clock:.2f} s, {state}")
            assert again.take(9) == stream.take(9)
            since += time.perf_counter() - clock
    seconds = time.perf_counter() - since
    print(f"{batches * batch_size / seconds:,.0f} prompts/s over {batches * batch_size:,}; {stream.counts()}")
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.3f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resume_at", type=int, default=100_000)
    args = parser.parse_args()
    if args.action == "write":
        write_koala(args.folder, args.rows)
    else:
        measure(args.folder, args.batches, args.batch_size, args.resume_at)
