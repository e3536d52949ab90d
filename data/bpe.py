"""A small byte-pair encoding, trained in seconds: 256 bytes, and the pairs of tokens worth a token of their own."""

import heapq
import re
from collections import Counter, defaultdict

from tqdm import tqdm

# How a text falls into chunks, no token crossing a chunk's end; near GPT-4's split. Only literal ranges: \w and \s mean
# different characters to Python, to Rust (tiktoken) and to Oniguruma (tokenizers), and unequal chunks give unequal ids.
# What is neither ASCII nor in one of three blocks of punctuation counts as a letter. No look-around: time is linear.
PUNCTUATION = r"!-/:-@\[-`{-~\u0080-\u00bf\u2000-\u206f\u3000-\u303f"
SPLIT = "|".join([
    r"[ \t\r\n]{2,}",  # a line's end and the next line's indentation are one chunk
    rf"[ {PUNCTUATION}]?[^\x00- 0-9\x7f{PUNCTUATION}]+",  # a word, with the space, dot, bracket or quote before it
    r"[0-9]{1,3}",
    rf" ?[{PUNCTUATION}]+",
    r"[\x00- \x7f]",  # all that is left, for tiktoken would drop what nothing matches
])
LONGEST = 128  # characters; training cuts longer chunks, or every step would walk a megabyte that has no space


def train_bpe(texts, vocab_size):
    """texts: iterable of str -> {token: id}: the 256 bytes, then merges up to vocab_size, fewer if no pair repeats.

    Each step merges the pair of neighbours with the highest count, of equals the lowest. Nothing is counted
    twice: a step visits only the words that hold its pair, and the heap tells the highest.
    """
    chunks = Counter()
    for text in tqdm(texts, desc="count words", unit=" documents", disable=None):  # None: silent in a pipe
        chunks.update(re.findall(SPLIT, text))
    words, counts = [], []  # ids of each distinct chunk, and how often it stands in the texts
    for chunk, count in chunks.items():
        for i in range(0, len(chunk), LONGEST):
            words.append(list(chunk[i:i + LONGEST].encode()))
            counts.append(count)

    pair_counts, words_with = Counter(), defaultdict(set)  # (left id, right id) -> count, -> places in words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([b]) for b in range(256)]
    bar = tqdm(desc="merge pairs", total=vocab_size, initial=len(tokens), unit=" tokens", disable=None)
    while heap and len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:  # out of date: counts fell since; put it back where it belongs
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -count < 2:
            break
        new, fresh = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        bar.update()
        for i in words_with.pop(pair):
            old, words[i] = words[i], merge(words[i], pair, new)
            for p in zip(old, old[1:]):
                pair_counts[p] -= counts[i]
            for p in zip(words[i], words[i][1:]):
                pair_counts[p] += counts[i]
                if new in p:
                    words_with[p].add(i)
                    fresh.add(p)
        for p in fresh:
            heapq.heappush(heap, (-pair_counts[p], p))
    bar.close()
    return {token: i for i, token in enumerate(tokens)}


def merge(word, pair, new):
    """word, a list of ids, with new in place of each pair of neighbours, from the left."""
    out, i = [], 0
    while i < len(word):
        hit = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        out.append(new if hit else word[i])
        i += 2 if hit else 1
    return out


def last_merge(token, ranks):
    """The two tokens that token is made of. ValueError if no merges of lower rank lead to it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == ranks[token]:
            raise ValueError(f"{token!r} cannot be merged")
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
