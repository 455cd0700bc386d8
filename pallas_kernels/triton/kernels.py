"""The Triton kernels: a program takes a 64 x 64 part of a matrix, or a row. Imported only by api.py, when it is called.

Tiles and metadata as `pallas_kernels.tile_order` and `pallas_kernels.metadata` describe them.
"""

import triton
import triton.language as tl


@triton.jit
def _keep_two(a, b, c, d, ka, kb, kc, kd):
    """The two largest keys of each four, ties to the lower index: entries low and high, nibbles, and what is kept."""
    ab, ac, ad = ka >= kb, ka >= kc, ka >= kd
    bc, bd, cd = kb >= kc, kb >= kd, kc >= kd
    keep_a = (ab & ac) | (ad & (ab | ac))
    keep_b = (~ab & bc) | (bd & (~ab | bc))
    keep_c = (~ac & ~bc) | (cd & (~ac | ~bc))
    keep_d = (~ad & ~bd) | (~cd & (~ad | ~bd))
    low = tl.where(keep_a, a, tl.where(keep_b, b, c))
    high = tl.where(keep_d, d, tl.where(keep_c, c, b))
    first = tl.where(keep_a, 0, tl.where(keep_b, 1, 2))
    second = tl.where(keep_d, 3, tl.where(keep_c, 2, 1))
    return low, high, first | (second << 2), keep_a, keep_b, keep_c, keep_d


@triton.jit
def _keep_two_16(a, b, c, d):
    ka, kb = a.to(tl.int16, bitcast=True) & 0x7FFF, b.to(tl.int16, bitcast=True) & 0x7FFF
    kc, kd = c.to(tl.int16, bitcast=True) & 0x7FFF, d.to(tl.int16, bitcast=True) & 0x7FFF
    return _keep_two(a, b, c, d, ka, kb, kc, kd)


@triton.jit
def _split_fours(x, rows: tl.constexpr, fours: tl.constexpr):
    """[rows, 4 fours] -> the first, second, third and fourth of each four."""
    even, odd = tl.split(tl.reshape(x, [rows, fours, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _store_tile(values_ptr, tile, low, high):
    """Entries [64, 16] as one tile of `tile_order`."""
    values = tl.reshape(tl.join(low, high), [64, 32])
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 32)[None, :]
    piece = (column // 8) ^ ((row // 2) % 4)
    tl.store(values_ptr + tile * 2048 + row * 32 + piece * 8 + column % 8, values)


@triton.jit
def _store_words(words_ptr, tile, nibbles):
    """Nibbles [64, 16] as the 128 words of a tile."""
    nibble = tl.arange(0, 4)[None, None, :]
    halves = tl.sum(tl.reshape(nibbles, [64, 4, 4]) << (4 * nibble), 2)
    half = tl.arange(0, 2)[None, :, None, None]
    words = tl.sum(tl.reshape(halves, [4, 2, 8, 4]) << (16 * half), 1)
    tl.store(words_ptr + tile * 128 + tl.arange(0, 128), tl.reshape(words, [128]))


@triton.jit
def pack_activations(
    y_ptr,
    features_ptr,
    squared_ptr,
    feature_words_ptr,
    tokens_ptr,
    token_words_ptr,
    positives_ptr,
    row_tiles: tl.constexpr,
    column_tiles: tl.constexpr,
    interleaved: tl.constexpr,
):
    """a = relu(y) packed along features, its square, and what is left packed along tokens."""
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    block = tl.arange(0, 64)
    columns = column_tile * 64 + tl.arange(0, 64)
    rows = row_tile * 64 + block
    if interleaved:
        rows = (block // 16) * (row_tiles * 16) + row_tile * 16 + block % 16
    y = tl.load(y_ptr + rows[:, None].to(tl.int64) * (column_tiles * 64) + columns[None, :])
    y = tl.where(y <= 0, 0.0, y).to(y_ptr.dtype.element_ty)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(tl.sum((y > 0).to(tl.int32), 1), 0))
    a, b, c, d = _split_fours(y, 64, 16)
    low, high, nibbles, keep_a, keep_b, keep_c, keep_d = _keep_two_16(a, b, c, d)
    if interleaved:
        # 16 rows of each of four quarters: each run of 16 lies in a tile of its own, at rows of the same place.
        _store_rows(features_ptr, feature_words_ptr, low, high, nibbles, rows, column_tile, column_tiles)
        _store_rows_of_values(squared_ptr, low * low, high * high, rows, column_tile, column_tiles)
    else:
        tile = row_tile * column_tiles + column_tile
        _store_tile(features_ptr, tile, low, high)
        _store_tile(squared_ptr, tile, low * low, high * high)
        _store_words(feature_words_ptr, tile, nibbles)
    zero = tl.zeros_like(a)
    even = tl.join(tl.where(keep_a, a, zero), tl.where(keep_c, c, zero))
    odd = tl.join(tl.where(keep_b, b, zero), tl.where(keep_d, d, zero))
    kept = tl.reshape(tl.join(even, odd), [64, 64])
    if interleaved:
        kept = tl.permute(tl.reshape(kept, [4, 16, 64]), [2, 1, 0])
    else:
        kept = tl.permute(tl.reshape(kept, [16, 4, 64]), [2, 0, 1])
    a, b, c, d = _split_fours(tl.reshape(kept, [64, 64]), 64, 16)
    low, high, nibbles, _a, _b, _c, _d = _keep_two_16(a, b, c, d)
    tile = column_tile * row_tiles + row_tile
    _store_tile(tokens_ptr, tile, low, high)
    _store_words(token_words_ptr, tile, nibbles)


@triton.jit
def _store_rows_of_values(values_ptr, low, high, rows, column_tile, column_tiles: tl.constexpr):
    """Entries [64, 16] of the given rows of the matrix, wherever their tiles are."""
    values = tl.reshape(tl.join(low, high), [64, 32])
    tile = (rows // 64) * column_tiles + column_tile
    row, column = rows[:, None], tl.arange(0, 32)[None, :]
    piece = (column // 8) ^ ((row // 2) % 4)
    tl.store(values_ptr + tile[:, None] * 2048 + (row % 64) * 32 + piece * 8 + column % 8, values)


@triton.jit
def _store_rows(values_ptr, words_ptr, low, high, nibbles, rows, column_tile, column_tiles: tl.constexpr):
    """As `_store_rows_of_values`, and the words of their positions: 16 rows from a multiple of 16 are one warp's."""
    _store_rows_of_values(values_ptr, low, high, rows, column_tile, column_tiles)
    nibble = tl.arange(0, 4)[None, None, :]
    halves = tl.sum(tl.reshape(nibbles, [64, 4, 4]) << (4 * nibble), 2)
    half = tl.arange(0, 2)[None, :, None, None]
    words = tl.reshape(tl.sum(tl.reshape(halves, [4, 2, 8, 4]) << (16 * half), 1), [4, 32])
    first = tl.min(tl.reshape(rows, [4, 16]), 1)
    at = ((first // 64) * column_tiles + column_tile) * 128 + (first % 64) * 2
    tl.store(words_ptr + at[:, None] + tl.arange(0, 32)[None, :], words)


@triton.jit
def pack_thresholded(
    w_ptr,
    beta_ptr,
    values_ptr,
    words_ptr,
    row_tiles: tl.constexpr,
    column_tiles: tl.constexpr,
    along_rows: tl.constexpr,
):
    """round(beta S(w)) packed, along columns or, transposed, along rows."""
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    rows, columns = row_tile * 64 + tl.arange(0, 64), column_tile * 64 + tl.arange(0, 64)
    w = tl.load(w_ptr + rows[:, None].to(tl.int64) * (column_tiles * 64) + columns[None, :]).to(tl.float32)
    tile = row_tile * column_tiles + column_tile
    if along_rows:
        w = tl.trans(w)
        tile = column_tile * row_tiles + row_tile
    a, b, c, d = _split_fours(w, 64, 16)
    ka, kb = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF, b.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    kc, kd = c.to(tl.int32, bitcast=True) & 0x7FFFFFFF, d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    low = tl.maximum(tl.minimum(ka, kb), tl.minimum(kc, kd))
    high = tl.minimum(tl.maximum(ka, kb), tl.maximum(kc, kd))
    key = tl.minimum(low, high)
    limit, t, beta = tl.minimum(key, 0x7F800000), key.to(tl.float32, bitcast=True), tl.load(beta_ptr)
    element = values_ptr.dtype.element_ty
    a = tl.where(ka > limit, beta * tl.where(a < 0, a + t, a - t), 0.0).to(element)
    b = tl.where(kb > limit, beta * tl.where(b < 0, b + t, b - t), 0.0).to(element)
    c = tl.where(kc > limit, beta * tl.where(c < 0, c + t, c - t), 0.0).to(element)
    d = tl.where(kd > limit, beta * tl.where(d < 0, d + t, d - t), 0.0).to(element)
    first, second, nibbles, _a, _b, _c, _d = _keep_two_16(a, b, c, d)
    _store_tile(values_ptr, tile, first, second)
    _store_words(words_ptr, tile, nibbles)


@triton.jit
def gather_rows(tokens_ptr, token_of_row_ptr, rows_ptr, tokens: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """rows[r] = tokens[token_of_row[r]], zero where that is the number of tokens."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of_row_ptr + row)
    column = tl.arange(0, block)
    inside = column < width
    found = tl.load(tokens_ptr + token.to(tl.int64) * width + column, mask=inside & (token < tokens), other=0.0)
    tl.store(rows_ptr + row * width + column, found, mask=inside)


@triton.jit
def sum_copies(rows_ptr, row_of_slot_ptr, tokens_ptr, top_k: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """tokens[t] = the sum of rows[row_of_slot[t, :]] from left to right in f32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    row = tl.load(row_of_slot_ptr + token * top_k).to(tl.int64)
    total = tl.load(rows_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(1, top_k):
        row = tl.load(row_of_slot_ptr + token * top_k + slot).to(tl.int64)
        total += tl.load(rows_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(tokens_ptr + token * width + column, total.to(tokens_ptr.dtype.element_ty), mask=inside)
