"""Which rows of a call run, where their keys and values lie, and what a query may see.

A branch runs on the rows (tokens) that pass. Three kinds of rows have one interface and are chosen once per branch:
`Everyone`, `Masked` and `Kept`. Then the KV cache, and `Call`, what the blocks of one forward pass share.

Shapes: B batch, S sequence (the tokens of this call), T key positions, Hkv key-value heads, D head dim, N rows that
run, M the most of them in one sequence.
"""
from dataclasses import dataclass, field

import torch


class Everyone:
    """Nobody skips: every row runs, and each step here is the identity."""
    none = False                    # no row passes: the branch need not run at all
    gathered = False                # take gives the rows that pass alone, (N, ...)
    lone_queries = None             # or a list of N sequences whose one query had better run attention one at a time

    def take(self, x):
        """The rows that run: (B or 1, S, ...) -> the same, or by Kept (N, ...)."""
        return x

    def put(self, new, old):
        """(B, S, ...): old, with the rows that pass replaced by new (what take gave, transformed)."""
        return new

    def add(self, h, o):
        """(B, S, H): h, with o added to the rows that pass; the others stay as they are, bit for bit."""
        return h + o

    def pad(self, x):
        """What take gave as a rectangle: the same, or by Kept (N, ...) -> (B, M, ...), a sequence's rows in front."""
        return x

    unpad = pad                                                  # the way back


class Masked(Everyone):
    """Every row runs, and `where` selects (a NaN in a skipped row stays there): the oracle, which saves nothing."""

    def __init__(self, keep):                                    # (B, S) bool
        self.keep = keep

    def put(self, new, old):
        return torch.where(self.keep[..., None, None], new, old)

    def add(self, h, o):
        return torch.where(self.keep[..., None], h + o, h)       # lines 9-15 of Algorithm 1


class Kept:
    """The kept rows are gathered, run, and written back to their own places. The mask travels to the host once."""
    gathered = True

    def __init__(self, keep):                                    # (B, S) bool
        self.batch, length = keep.shape
        host = keep.cpu()                                        # the synchronisation
        count = int(host.sum())                                  # N
        self.none, self.every, self.lone_queries = count == 0, count == keep.numel(), None
        if self.every or self.none:                              # nothing to gather
            return
        seq, pos = host.nonzero(as_tuple=True)                   # (N,), (N,) sorted by sequence
        column = (host.cumsum(1) - 1)[seq, pos]                  # (N,) place among its sequence's kept rows
        self.longest = int(host.sum(1).max())                    # M
        self.seq, self.column = seq.to(keep.device, non_blocking=True), column.to(keep.device, non_blocking=True)
        self.flat = (seq * length + pos).to(keep.device, non_blocking=True)      # (N,) place in the flattened (B, S)
        if length == 1 and keep.device.type == "cpu":            # a GPU would pay more for the launches
            self.lone_queries = seq.tolist()

    def take(self, x):
        return x.expand(self.batch, *x.shape[1:]).flatten(0, 1).index_select(0, self.flat)

    def put(self, new, old):
        return old.flatten(0, 1).index_copy(0, self.flat, new).view_as(old)

    def add(self, h, o):
        return h.flatten(0, 1).index_add(0, self.flat, o).view_as(h)

    def pad(self, x):
        return x.new_zeros(self.batch, self.longest, *x.shape[1:]).index_put((self.seq, self.column), x)

    def unpad(self, x):
        return x[self.seq, self.column]


def rows_of(keep, compact):
    """The rows that pass a keep mask (B, S) bool: one of the three."""
    if not compact:
        return Masked(keep)
    rows = Kept(keep)
    return Everyone() if rows.every else rows


class KVCache:
    """One preallocated (B, Hkv, S_max, D) pair per layer. A token's slot is its position in its own sequence."""

    def __init__(self, config, batch, max_length, device="cpu", dtype=torch.float32):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)       # tokens cached per sequence
        self.used = 0                # host-side upper bound of lengths: how many slots attention has to look at
        self.uniform = True          # every sequence holds exactly `used` tokens

    def write(self, layer, k, v, slots):
        """Store k, v (B, S, Hkv, D). slots: a slice that all sequences share, or index tensors (seq, column, slot)."""
        if isinstance(slots, slice):
            self.k[layer][:, :, slots] = k.transpose(1, 2)
            self.v[layer][:, :, slots] = v.transpose(1, 2)
        else:
            seq, column, slot = slots                                            # (tokens,) each
            self.k[layer][seq, :, slot] = k[seq, column]                         # (tokens, Hkv, D)
            self.v[layer][seq, :, slot] = v[seq, column]

    def select(self, sequences):
        """Go on with these sequences only, a (B',) index tensor: finished ones leave the computation."""
        for layer, (k, v) in enumerate(zip(self.k, self.v)):     # one at a time: two whole caches may not fit
            self.k[layer], self.v[layer] = k[sequences], v[sequences]
        self.lengths = self.lengths[sequences]


@dataclass
class Call:
    """What the blocks of one forward pass share. Only `keep` and `mask_of` change while it runs."""
    valid: torch.Tensor             # (B, S) bool: True = real token
    padded: bool                    # some may be padding
    policy: object                  # gates.SkipPolicy
    compact: bool                   # gather the kept rows | run every row
    positions: torch.Tensor         # (B, S), or (1, S) where all sequences agree
    plain: bool                     # no padding, and every sequence at the same positions
    span: int                       # no token's position reaches this, though padding's may
    cache: KVCache = None
    fresh: bool = True              # nothing cached before this call: its own keys are all there is
    slots: object = None            # where KVCache.write puts this call's tokens
    cos: torch.Tensor = None        # (B or 1, S, 1, D/2), by the model
    sin: torch.Tensor = None
    keep: dict = field(default_factory=dict)     # branch -> (B, S) bool, as decided
    mask_of: dict = field(default_factory=dict)  # window -> attention mask, where all rows run

    def __post_init__(self):
        self.real = rows_of(self.valid, self.compact) if self.padded else Everyone()

    def rows(self, keep):
        """The rows that pass a keep mask (B, S)."""
        return self.real if keep is self.valid else rows_of(keep, self.compact)  # valid itself: nobody skips

    @property
    def keys(self):
        """How many key positions attention multiplies with."""
        return self.valid.shape[1] if self.fresh else self.cache.used

    def store(self, layer, k, v):
        """Cache k, v (B, S, Hkv, D) -> all keys and values that this call may look at, (B, Hkv, T, D) each."""
        if self.cache is not None:
            self.cache.write(layer, k, v, self.slots)
        if self.fresh:
            return k.transpose(1, 2), v.transpose(1, 2)
        return self.cache.k[layer][:, :, :self.keys], self.cache.v[layer][:, :, :self.keys]


def start_call(shape, device, positions, valid, cache, policy, compact):
    """The Call of one forward pass over shape (B, S): positions and slots, worked out once for all blocks.

    Arguments as of Model.forward. Advances the cache's lengths. ValueError when the cache is too short.
    """
    B, S = shape
    fresh = cache is None or cache.used == 0
    plain = valid is None and positions is None and (cache is None or cache.uniform)
    if positions is None:
        step = torch.arange(S, device=device)[None] if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        start = 0 if fresh else cache.used if cache.uniform else cache.lengths[:, None]
        positions = start + step                                                 # (B or 1, S)
        end = S + (0 if cache is None else cache.used)
    else:
        end = max(int(positions.max()) + 1, 0 if cache is None else cache.used)  # a host synchronisation
    slots = None
    if cache is not None:
        room = cache.k[0].shape[2]
        taken = positions + 1 if valid is None else torch.where(valid, positions + 1, 0)
        lengths = torch.maximum(cache.lengths, taken.amax(1))                    # (B,)
        if end > room:                                                           # padding may have inflated the bound
            end = int(lengths.max())                                             # a host synchronisation
        if end > room:
            raise ValueError(f"the cache has {room} slots and this call needs {end}: make it longer")
        if plain:
            slots = slice(end - S, end)
        elif valid is None:
            seq = torch.arange(B, device=device)[:, None].expand(B, S).flatten()
            slots = seq, torch.arange(S, device=device).repeat(B), positions.expand(B, S).flatten()
        else:
            seq, column = valid.nonzero(as_tuple=True)                           # a host synchronisation, if padded
            slots = seq, column, positions[seq, column]
        cache.used, cache.uniform, cache.lengths = end, plain, lengths
    everyone = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    return Call(valid=everyone, padded=valid is not None, policy=policy, compact=compact, positions=positions,
                plain=plain, span=end, cache=cache, fresh=fresh, slots=slots)


def attention_mask(call, rows, window, as_tensor):
    """What the queries of these rows may see: (additive mask (B or 1, 1, M, T) or None, is_causal).

    A query at position p sees the key at j iff j <= p, under a sliding window also j > p - window. as_tensor: attention
    that cannot take is_causal, because it caps its scores.
    """
    if window is not None and max(call.keys, call.span) <= window:
        window = None
    if call.plain and window is None:
        if call.valid.shape[1] == 1:
            return None, False                                                   # one query sees all there is
        if call.fresh and not rows.gathered and not as_tensor:
            return None, True
    if not rows.gathered and window in call.mask_of:
        return call.mask_of[window], False
    query = rows.pad(rows.take(call.positions))                                  # (B or 1, S or M): absolute positions
    if call.fresh:
        key = call.positions                                                     # keys lie in call order
    else:
        key = torch.arange(call.keys, device=query.device)[None]                 # keys lie in slots = positions
    key, query = key[:, None, :], query[:, :, None]
    sees = key <= query if window is None else (key <= query) & (key > query - window)           # (B or 1, S or M, T)
    if call.fresh and call.padded:
        sees = sees & call.valid[:, None, :]
    # large and finite: a row that sees nothing must not become NaN
    mask = torch.zeros(sees.shape, dtype=call.cos.dtype, device=sees.device)
    mask = mask.masked_fill(~sees, torch.finfo(mask.dtype).min / 2)[:, None]
    if not rows.gathered:
        call.mask_of[window] = mask
    return mask, False
