"""How many rows of logits are held at a time."""

# Elements of one (rows, V) chunk in plain torch, of which two or three are alive at a time: 4 MiB in float32, which
# stays in a CPU's cache, and, of a linear head, 128 MiB on CUDA. A head's chunk of few rows would make inefficient
# products, and reads and writes the gradient of a trained head for little.
CHUNK_ELEMENTS = 2**20
CUDA_CHUNK_ELEMENTS = 2**25
CHUNK_ROWS = 64
# The Triton path holds one chunk, in the operands' type. Every chunk of a trained head reads and writes the float32
# weight gradient once; a frozen head's chunk can be small enough to stay in the L2 cache.
TRAINED_CHUNK_ELEMENTS = 2**28
FROZEN_CHUNK_ELEMENTS = 2**24
MINIMUM_CHUNK_ROWS = 1024  # below this a matrix product is not efficient


def head_chunk_rows(vocabulary, device):
    elements = CUDA_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS
    return max(CHUNK_ROWS, elements // max(vocabulary, 1))


def logits_chunk_rows(vocabulary):
    return max(1, CHUNK_ELEMENTS // max(vocabulary, 1))


def fits_a_chunk(count, vocabulary):
    """Whether a forward may keep log p for its backward."""
    return count * vocabulary <= CHUNK_ELEMENTS


def workspace_rows(vocabulary, count, trained):
    """Rows of the Triton path's workspace: chunks of equal size, as few as the bound allows."""
    elements = TRAINED_CHUNK_ELEMENTS if trained else FROZEN_CHUNK_ELEMENTS
    most = max(MINIMUM_CHUNK_ROWS, elements // vocabulary)
    chunks = max(1, -(-count // most))
    return max(1, -(-count // chunks))


def row_spans(count, step):
    """The ``(start, stop)`` spans of at most ``step`` rows that cover ``count`` rows; one, if there are none."""
    return [(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def aligned_spans(lengths, step):
    """``(start, stop, first sequence, last sequence + 1)``: whole sequences, at most ``step`` rows where they fit."""
    spans, start, stop, first = [], 0, 0, 0
    for number, length in enumerate(lengths):
        if stop > start and stop + length - start > step:
            spans.append((start, stop, first, number))
            start, first = stop, number
        stop += length
    if stop > start or not spans:
        spans.append((start, stop, first, len(lengths)))
    return spans
