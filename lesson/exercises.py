"""Fifteen small functions, in the order in which the paper needs them. Write each in place of its `raise` and run

    python -m pytest lesson                       or, for one of them, e.g. python -m pytest lesson -k budget_at

It says of each whether it is right, and if not, for which input it returned what in place of what. (-s shows what your
functions print; -v brings back pytest's own report.) You need PyTorch and what the docstrings say, nothing else of the
project. Line N is a line of the paper's Algorithm 1 unless another is named, eq. N its equation ("What Layers When:
Learning to Skip Compute in LLMs with Residual Gates", arXiv 2510.13876); "ours" says that the paper has no such thing,
or another one.

A decoder of L layers has 2L residual branches: attention and MLP of each layer. A gate looks at each token in front of
each branch; its mean is the token's score. Tokens with a low score skip the branch. The budget is the share that stays.

Shapes: B sequences, S tokens in each, H channels (the model's width), L layers, N branches, V words in the vocabulary.
Tensors are float64 or bool. A function returns something new: it leaves its arguments as they are. Where a number is
to be returned, a float and a tensor with one element are both right, and a whole number may come in any type.
"""
import torch


def gate_and_score(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate of each token, and its score. Eq. 2 (the gate), lines 6 and 7.

    x (S, H): S tokens. weight (H, H) and bias (H,) are W_G and b_G. For a token x_i, a vector of H channels,

        g_i = sigmoid(W_G x_i + b_G)            channel k of W_G x_i is the sum over j of W_G[k, j] * x_i[j]
        score_i = the mean of g_i over its channels                             (the paper writes it g-bar_i)

    A scalar gate has weight (1, H) and bias (1,): one value per token. The same formula serves both.
    Returns (g, score): g (S, H), or (S, 1) of a scalar gate; score (S,).
    """
    raise NotImplementedError


def quantile_threshold(v: torch.Tensor, q: float) -> float:
    """The q-quantile of the scores v (n,), n >= 1, with q from 0 to 1. Algorithm 3, lines 1 to 7.

        s = v sorted, smallest first;  s[0] ... s[n-1]
        pos = q * (n - 1);  i = pos rounded down;  alpha = pos - i
        tau = (1 - alpha) * s[i] + alpha * s[i+1]                               (where alpha is 0, s[i])

    Two things that the paper leaves to you. At q = 1 there is no s[i+1]. And (1 - 0.8) * 10 is 1.9999999999999996 on a
    computer: take a pos that lies within 1e-9 of a whole number for that number. (It shows in select_tokens.)
    torch.quantile does nearly this; write it without.
    """
    raise NotImplementedError


def select_tokens(scores: torch.Tensor, budget: float, valid: torch.Tensor) -> torch.Tensor:
    """Which tokens are kept at a branch. Eq. 6, lines 8 and 10, with two exceptions that are ours.

    scores (B, S); valid (B, S) bool: False is padding, whose scores mean nothing: it is neither ranked nor kept.
    budget in (0, 1].

        tau = the (1 - budget)-quantile (your quantile_threshold) of the scores of all valid tokens, of all B sequences
        a token with score <= tau is skipped, and the others are kept

    The exceptions:  1. At budget 1 every valid token is kept. (As printed, the lowest would be skipped.)
                     2. If that would keep nobody in the whole batch, the valid tokens with the largest score are
                        kept, all that have it. (As printed, a lone token, or tokens with equal scores, would all be
                        skipped.)
    Where no token is valid, nobody is kept. Returns keep (B, S) bool.
    """
    raise NotImplementedError


def gated_residual(h: torch.Tensor, g: torch.Tensor, o: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The residual stream behind a branch. Eq. 2, lines 9 to 15.

    h (S, H): the stream before the branch; g (S, H), or (S, 1) of a scalar gate; o (S, H): what the branch made;
    keep (S,) bool.

        kept:     h_i + g_i * o_i       (channel by channel)
        skipped:  h_i, as it was, bit for bit: o_i may be anything there, even NaN, for nobody was to look at it

    Returns (S, H).
    """
    raise NotImplementedError


def kv_source(keep: torch.Tensor) -> torch.Tensor:
    """Which layer made the keys and values that lie in the cache of each layer, for each token. Section 3.3.

    keep (L, S) bool: whether token i ran the attention of layer l. A token that skips the attention of layer l makes
    no key and no value there. Those that lie in the cache of layer l - 1 for it are copied up, wherever they come from:
    in a run of skips the same ones travel up through all layers of the run. Layer 0 has nothing below it, so there keys
    and values are made for every token, skipped or not.
    Returns (L, S) int64: the number of the layer, counted from 0.
    """
    raise NotImplementedError


def budget_at(step: int, total: int, start: float, end: float) -> float:
    """The budget of training step `step` = 0, 1, ..., total - 1. Line 3.

    The paper counts t = 1 ... T:   b_t = b_1 - (b_1 - b_2) * (t - 1) / (T - 1)
    Here t = step + 1, T = total, b_1 = start, b_2 = end: a straight line, exactly start at the first step and exactly
    end at the last. A training of one step has budget end (ours: the formula divides by zero).
    """
    raise NotImplementedError


def sparsity_l1(gates: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What pulls the gates shut, as the paper's box has it. Line 18.

    gates (N, S, H): the gates of all N branches; valid (S,) bool: False is padding, which counts in no way.
    The mean of |g| over branches, valid tokens and channels. (A gate is a sigmoid, so |g| is g.) Returns a number.
    """
    raise NotImplementedError


def sparsity_l2(gates: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What pulls the gates shut, as the authors' code has it; the project's default. Ours in place of line 18.

    gates (N, S, H), valid (S,) bool as in sparsity_l1. The mean of g^2 over branches, valid tokens and channels.
    """
    raise NotImplementedError


def sparsity_l2_norm(gates: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What pulls the gates shut, as the paper's text has it. Eq. 4.

    gates (N, S, H), valid (S,) bool as in sparsity_l1, n valid tokens. For each branch and each channel k

        norm_k = sqrt(sum over the valid tokens i of g_ik^2) / sqrt(n)

    and of these the mean over branches and channels. (Dividing by sqrt(n) is ours: without it, a long text would
    weigh more than a short one.)
    """
    raise NotImplementedError


def sparsity_kl(gates: torch.Tensor, valid: torch.Tensor, budget: float) -> torch.Tensor:
    """What pulls the gates towards the budget: the paper's ablation "KL", in the section on its ablations.

    gates (N, S, H), valid (S,) bool as in sparsity_l1. m_l: the mean gate of branch l over valid tokens and channels.
    The sum over branches of

        KL(m_l || b) = m_l * log(m_l / b) + (1 - m_l) * log((1 - m_l) / (1 - b))            (natural logarithm)

    b is the budget, moved into [0.01, 0.99], and every m_l is moved into [1e-6, 1 - 1e-6] (both ours: log(0) is -inf).
    """
    raise NotImplementedError


def attention_macs(hidden: int, heads: int, kv_heads: int, head_dim: int, keys: int, tokens: int, kept: int,
                   gate: int) -> int:
    """Multiply-accumulates (MACs) of an attention branch for `tokens` tokens, `kept` of which run it. Ours: the paper
    counts skipped branches, not work.

    A vector of m numbers times an (m x n) matrix takes m * n MACs. A token that is kept is multiplied with
        W_q  hidden x (heads * head_dim)        W_k and W_v  hidden x (kv_heads * head_dim) each
        W_o  (heads * head_dim) x hidden
    and each of its heads takes a product of length head_dim with the keys of `keys` positions, and then sums the values
    of as many, of head_dim numbers each. (A key-value head serves several query heads, but each of those multiplies.)
    A token that is skipped does nothing of that: its K and V are copied. But before anybody knows who is skipped, the
    gate, a (hidden x gate) matrix, is multiplied with every token. gate: hidden for a vector gate, 1 for a scalar one,
    0 without gates. Norms, the softmax and the sigmoid are not counted. Returns a whole number.
    """
    raise NotImplementedError


def mlp_macs(hidden: int, inner: int, tokens: int, kept: int, gate: int) -> int:
    """The same as attention_macs, of an MLP branch (SwiGLU, as in Llama). Ours.

    A token that is kept goes through three matrices: two hidden x inner ("gate" and "up") and one inner x hidden
    ("down"). The "gate" of SwiGLU is not GateSkip's, a (hidden x gate) matrix that every token is multiplied with.
    """
    raise NotImplementedError


def frozen_threshold(scores: torch.Tensor, q: float) -> float:
    """A threshold to be used for ever, that skips about a share q of these scores and lies on none of them. Ours.

    scores (n,). Equal tokens have equal scores, and a quantile likes to fall on such a tie: then one rounding error in
    the score decides whether all of them are skipped or none.

        tau = the q-quantile of the scores (your quantile_threshold)
        tied = the scores within 1e-6 of tau

    * Nothing is tied: tau lies in the gap between two neighbouring scores. Return the middle of that gap.
    * Else return one of two cuts:
        low    the middle between the smallest of the tied and the next smaller score; if there is none, the smallest
               of the tied minus 1e-4
        high   the middle between the largest of the tied and the next larger score; if there is none, the largest of
               the tied plus 1e-4
      namely the one whose share (scores <= cut, divided by n) is nearer to q; low, if both are as near.
    """
    raise NotImplementedError


def update_quantile(old: torch.Tensor | None, scores: torch.Tensor, costs: torch.Tensor, valid: torch.Tensor,
                    points: int) -> torch.Tensor:
    """One step of a running quantile of the scores of all branches, weighted by work: which threshold lets what share
    of the work run. Ours: the paper takes a quantile for each branch.

    scores (N, S): of N branches and S tokens; costs (N,): the work of a branch for one token, 0 where nobody may skip;
    valid (S,) bool. A score weighs the cost of its branch; that of padding, or of a branch with cost 0, is left out.
    The quantile is asked for at `points` >= 2 shares q = 0, 1 / (points - 1), ..., 1:

        new[q] = the smallest score t such that the scores <= t together weigh at least q * (the weight of all)

    It is always one of the scores: no line is drawn between two of them. At q = 0 it is the smallest.
    old (points,) is what the step before returned, or None before the first step.
    Returns (points,): new in the first step, and then 0.9 * old + 0.1 * new.
    """
    raise NotImplementedError


def accept_draft(p: torch.Tensor, q: torch.Tensor, token: int, u: float) -> tuple[bool, torch.Tensor]:
    """Speculative decoding: whether the large model accepts a token that a cheap one (here the same model with tokens
    skipped) has drawn, such that the text is distributed as if the large one had drawn it. Ours, not in the paper:
    Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", section 2.3.

    p (V,): the large model's probabilities of the next token; q (V,): the cheap one's, from which `token` was drawn, so
    that q[token] > 0. u: drawn uniformly from [0, 1).

        accepted:  with probability min(1, p[token] / q[token]), that is, if u is less than it
        rest:      what a token is drawn from if this one is not accepted: max(p - q, 0), divided by its sum

    A token with p[token] = 0 is never accepted, not even at u = 0. Where p equals q, nothing is left: then rest is p.
    Returns (accepted, rest): a bool, and (V,) whether it was accepted or not.
    """
    raise NotImplementedError
