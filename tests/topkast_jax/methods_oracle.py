"""The methods of the literature in plain NumPy, one leaf or a few; imported by tests only."""

import numpy as np
import oracle


def fan_in_top(scores, count, among=None):
    """The largest `count` entries in all, the same number of each column."""
    columns = np.abs(scores).reshape(-1, scores.shape[-1])
    allowed = np.ones_like(columns, bool) if among is None else among.reshape(columns.shape)
    mask = np.zeros_like(allowed)
    for c in range(columns.shape[1]):
        mask[:, c] = largest(columns[:, c], count // columns.shape[1], allowed[:, c])
    return mask.reshape(scores.shape)


def largest(scores, count, among=None):
    """The `count` largest scores among those allowed; of equal ones the lower index."""
    ranked = np.abs(np.asarray(scores, np.float64)).ravel()
    if among is not None:
        ranked = np.where(among.ravel(), ranked, -1.0)
    mask = np.zeros(ranked.size, bool)
    mask[np.lexsort((np.arange(ranked.size), -ranked))[:count]] = True
    return mask.reshape(np.shape(scores))


def cosine(fraction, step, end):
    """RigL's drop fraction, in the float32 arithmetic of the reference implementation."""
    if end is None:
        return np.float32(fraction)
    if step >= end:
        return np.float32(0)
    passed = np.float32(step) / np.float32(end)
    return np.float32(fraction) / 2 * (1 + np.cos(np.float32(np.pi) * passed))


def drop_and_grow(theta, held, scores, fraction, count=None, top=largest):
    """(next mask, grown anew): drop ⌊f k⌋ by magnitude, grow by score where nothing stays."""
    k = int(held.sum())
    staying = k - int(np.floor(np.float32(fraction) * np.float32(k)))
    stays = top(theta, staying, held)
    grown = top(scores, (k if count is None else count) - staying, ~stays)
    return stays | grown, grown & ~held


def cubic(entries, final, step, begin, end):
    """Zhu and Gupta's schedule, in kept entries."""
    passed = np.clip((np.float32(step) - begin) / np.float32(end - begin), 0, 1)
    return final + int(np.round(np.float32(entries - final) * (1 - passed) ** 3))


def global_masks(scores, total):
    """The `total` largest scores over all leaves, which must not tie with each other."""
    flat = np.concatenate([np.abs(np.asarray(s, np.float64)).ravel() for s in scores.values()])
    kept = largest(flat, total)
    masks, start = {}, 0
    for name, s in scores.items():
        masks[name] = kept[start : start + s.size].reshape(s.shape)
        start += s.size
    return masks


def shares(total, weights, room):
    """SNFS: whole parts in proportion to weights, none above its room."""
    weights, room = np.asarray(weights, np.float64), np.asarray(room, int)
    full = np.zeros(len(weights), bool)
    while True:
        left = total - room[full].sum()
        parts = np.where(full, 0, left * np.where(full, 0, weights) / weights[~full].sum())
        over = ~full & (parts >= room)
        if not over.any():
            break
        full |= over
    result = np.where(full, room, np.floor(parts).astype(int))
    order = np.argsort(-np.where(full, -1, parts - np.floor(parts)), kind="stable")
    for i in order[: total - result.sum()]:
        result[i] += 1
    return result


kept = oracle.keep_count
