"""What a group of boards can carry, by queueing theory: pure functions, times in seconds.

The model is that of Mitra, Kaswan, Ulukus, "Distributed Mixture-of-Agents for Edge Inference with
Large Language Models", arXiv 2412.21200: each of n boards has a user whose prompts come at rate
lambda (per second), a prompt goes through M ``layers``, in each of which the owner and k
``proposers`` among the other boards propose, and the owner aggregates at the end. An inference
takes alpha seconds of a board's model, and each board serves one first-come-first-served queue.
Its queues are bounded as long as every board's ``load``, the share of time for which its model is
wanted, is below 1. M = 0 is a board alone.

Every function raises ValueError for arguments that mean nothing, such as a negative time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from operator import mul
from typing import Final

CHAIN_PLACES: Final = 128  # that are computed one by one; behind them the tail is geometric
SETTLED: Final = 1e-10  # change from place to place of the tail's ratio that is taken for none
CERTAIN: Final = 1e30  # a queue so much likelier to hold someone than nobody is never empty


# --- work, and the loads that it makes


def jobs_per_prompt(layers: int, proposers: int) -> int:
    """(k + 1) M + 1: the inferences that one prompt takes, on all boards together.

    Source: arXiv 2412.21200, the arrival rate behind Theorem 1.
    """
    _check(layers, proposers)
    return (proposers + 1) * layers + 1


def load(alpha_s: float, rate: float, layers: int, proposers: int) -> float:
    """alpha ((k + 1) M + 1) lambda: of every board where all are alike; stable below 1.

    :param rate: prompts per second of each user.

    Source: arXiv 2412.21200, Theorem 1.
    """
    _check(alpha_s, rate)
    return alpha_s * jobs_per_prompt(layers, proposers) * rate


def largest_rate(alphas_s: Sequence[float], layers: int, proposers: int) -> float:
    """The prompts per second of each user below which all queues stay bounded, where peers are
    picked uniformly: the slowest board decides. With boards that are alike it is Theorem 1's.

    :param alphas_s: seconds of an inference on each board; they may differ.

    Source: arXiv 2412.21200, Theorem 1 and (6).
    """
    slowest_s = max(_positive(alphas_s))
    return 1 / (jobs_per_prompt(layers, proposers) * slowest_s)


def service_s(
    prompt_tokens: float, tokens: float, prefill_per_s: float, decode_per_s: float
) -> float:
    """S = L_in / P + L_out / D: seconds of an inference that reads and writes so many tokens."""
    _check(prompt_tokens, tokens)
    _positive((prefill_per_s, decode_per_s))
    return prompt_tokens / prefill_per_s + tokens / decode_per_s


def own_s(first_s: float, later_s: float, layers: int) -> float:
    """S_1 + M S_a: seconds that a prompt takes of its owner's model.

    It proposes once with the prompt alone to read (``first_s``, S_1), once more in each later layer
    and aggregates at the end with the proposals to read (``later_s``, S_a). With both alike it is
    the paper's alpha (M + 1).
    """
    _check(first_s, later_s, layers)
    return first_s + layers * later_s


def picked_s(first_s: float, later_s: float, layers: int) -> float:
    """S_1 + (M - 1) S_a: seconds that a prompt takes of one other board's model that is picked in
    every layer; k boards' worth in all. With both alike it is the paper's alpha M."""
    _check(first_s, later_s, layers)
    return first_s + (layers - 1) * later_s if layers else 0.0


def prompt_s(first_s: float, later_s: float, layers: int, proposers: int) -> float:
    """(k + 1) S_1 + ((M - 1)(k + 1) + 1) S_a: seconds that a prompt takes of all models together,
    first proposals apart from the rest; S_1 where M = 0. A group of boards that are alike is stable
    where this times the rate of one user is below 1.

    Source: Theorem 1 with two classes of service; the load of a queue does not depend on how it is
    made up.
    """
    _check(proposers)
    return own_s(first_s, later_s, layers) + proposers * picked_s(first_s, later_s, layers)


def loads(
    owned_s: Sequence[float],
    helped_s: Sequence[float],
    rates: Sequence[float],
    shares: Sequence[Sequence[float]],
    proposers: int,
) -> list[float]:
    """Each board's load where peers are picked unevenly; stable if all are below 1.

    lambda_i own_i + k sum_j lambda_j p_ji picked_i, which for one alpha per board is
    alpha_i [(M + 1) lambda_i + M k sum_j lambda_j p_ji].

    :param owned_s: what :func:`own_s` says for each board.
    :param helped_s: what :func:`picked_s` says for each board.
    :param rates: each user's prompts per second.
    :param shares: ``shares[j][i]`` is p_ji, the share of j's picks that go to i.

    Source: the argument of arXiv 2412.21200 for (6), with picks that need not be uniform.
    """
    _check(*owned_s, *helped_s, *rates, proposers)
    if not len(owned_s) == len(helped_s) == len(rates) == len(shares):
        raise ValueError("not the same number of boards in every argument")
    for j, row in enumerate(shares):
        _check(*row)
        if len(row) != len(rates) or row[j] or not (math.isclose(sum(row), 1) or not any(row)):
            raise ValueError(f"the picks of board {j} are not shares of the others")
    picks = [
        proposers * math.fsum(rate * row[i] for rate, row in zip(rates, shares, strict=True))
        for i in range(len(rates))
    ]
    return [
        rate * own + pick * helped
        for rate, own, pick, helped in zip(rates, owned_s, picks, helped_s, strict=True)
    ]


def best_rate(
    alphas_s: Sequence[float],
    layers: int,
    proposers: int,
    *,
    own_jobs: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> float:
    """The prompts per second of each user that no way to pick peers can exceed.

    It is the optimum of a linear program: x_ij, how often owner i picks j for a prompt, is at most
    M, sum_j x_ij = k M, x_ii = 0, and alpha_j lambda (own_j + sum_i x_ij) <= 1. That is a flow from
    owners to boards over edges that all hold M, so by Gale's theorem of supply and demand it is
    possible just if any set of s boards can take what the owners cannot place outside of it: those
    within have n - s other boards to go to, those outside n - s - 1. The largest lambda is where
    the tightest set is full.

    :param own_jobs: what a prompt takes of its owner's board, in inferences: M + 1 unless said
        otherwise, 1 for an owner that only aggregates, 0 for one that hands even that to another
        board, whose own jobs it has then to be counted with.
    :param weights: each user's rate as a multiple of the one that is returned, 1 unless said
        otherwise.

    Source: D. Gale, "A theorem on flows in networks", Pacific J. Math. 7 (1957) 1073.
    """
    n = len(alphas_s)
    _check(layers, proposers)
    own = [layers + 1.0] * n if own_jobs is None else own_jobs
    weight = [1.0] * n if weights is None else weights
    _check(*own, *weight)
    if not n == len(own) == len(weight):
        raise ValueError("not the same number of boards in every argument")
    if proposers >= n:
        raise ValueError(f"{proposers} proposers among {n - 1} other boards")
    speeds = [1 / alpha for alpha in _positive(alphas_s)]
    # Per inverse rate y, board j can take speeds_j y; a set S of s boards has to take
    # sum_S own_j w_j + within sum_S w_j + outside (sum of all w - sum_S w_j). Raising y until the
    # set that lacks most lacks nothing is Newton's method on a convex function with finitely many
    # pieces: it ends at the exact solution.
    y = 0.0
    for size in range(1, n + 1):
        within = max(0, layers * (proposers - (n - size)))
        outside = max(0, layers * (proposers - (n - size - 1)))
        everyone = outside * math.fsum(weight)
        wanted = [w * (o + within - outside) for w, o in zip(weight, own, strict=True)]
        while True:
            spare = [speed * y - want for speed, want in zip(speeds, wanted, strict=True)]
            tightest = sorted(range(n), key=spare.__getitem__)[:size]
            needed = everyone + math.fsum(wanted[j] for j in tightest)
            at_least = needed / math.fsum(speeds[j] for j in tightest)
            if at_least <= y * (1 + 1e-12):
                break
            y = at_least
    return 1 / y if y else math.inf


def batch_share_s(step_s: float, each_s: float, most: float) -> float:
    """t0 / b + a: what a job takes of a model that is always writing b = ``most`` jobs at a time,
    where tau(b) = t0 + a b is what b of them take together. The condition of every function here
    holds with it for alpha; with no bound on b (``math.inf``) a alone is left.

    :param step_s: t0, seconds that the jobs of a batch share: of a step, times steps of a job.
    :param each_s: a, seconds more for each job.

    Source: a busy batch server is always at its largest batch, which serves b jobs in tau(b).
    """
    _check(step_s, each_s)
    _positive((most,), finite=False)
    return step_s / most + each_s


# --- how long work takes that has to wait


def sojourn_s(rate: float, mean_s: float, second_moment_s2: float) -> float:
    """W = E[S] + lambda E[S^2] / (2 (1 - rho)): seconds from a job's coming to its end, on average,
    where jobs come at random and are served in their order; infinite from rho = 1 on.

    :param rate: jobs per second at this board.
    :param second_moment_s2: E[S^2]: variance plus squared mean.

    Source: Pollaczek and Khinchine.
    """
    _check(rate, mean_s, second_moment_s2)
    spare = 1 - rate * mean_s
    return mean_s + rate * second_moment_s2 / (2 * spare) if spare > 0 else math.inf


def latency_s(job_s: float, layers: int, proposers: int) -> float:
    """T ~ W (1 + M H_(k+1)): seconds from a prompt to its whole answer, where each of its jobs
    takes ``job_s`` on average, waiting included, and a layer as long as the longest of k + 1.

    H_n = 1 + 1/2 + ... + 1/n is the mean of the longest of n exponential times of mean 1. It was
    within 5 % of simulation for exponential service, -12 to +21 % for half as much spread.
    """
    _check(job_s, layers, proposers)
    return job_s * (1 + layers * math.fsum(1 / i for i in range(1, proposers + 2)))


# --- how often a bounded queue is full


def blocking(load: float, scv: float, places: int, resume: float = 1.0) -> float:
    """The share of jobs that are refused by a queue of ``places``, the one in service counted.

    Jobs come at random and their service times are gamma distributed: the queue as departing jobs
    leave it behind is then a Markov chain that can be solved exactly. With other distributions of
    the same mean and variance it is close; with scv = 1 it is M/M/1/K and with 0 M/D/1/K.

    :param load: rho, what arrives over what can be served; may be 1 and more.
    :param scv: squared coefficient of variation of service times: variance over squared mean.
    :param resume: once all places were taken, none is given until fewer than this share of them
        are; with 1, as soon as one is free.

    Source: the embedded chain of M/G/1/K (e.g. Gross and Harris, "Fundamentals of Queueing Theory",
    5.1.8); arrivals during a gamma time are negative binomial.
    """
    _check(load, scv, resume)
    if places < 1:
        raise ValueError(f"a queue of {places} places")
    return next(islice(_refused(load, scv, resume), places - 1, None))


def places_for(
    load: float, scv: float, target: float, most: int, resume: float = 1.0
) -> int | None:
    """The fewest places with which at most a share ``target`` of jobs is refused; None where even
    ``most`` are too few, as they always are from load = 1 / (1 - target) on.

    Source, and the other parameters: as of :func:`blocking`.
    """
    _check(load, scv, target, resume)
    found = islice(_refused(load, scv, resume), most)
    return next((i for i, share in enumerate(found, 1) if share <= target), None)


def batch_blocking(rate: float, batches_s: Sequence[float], places: int) -> float:
    """The share of jobs that find all ``places`` taken where up to b of them are written at a time.

    Exact for exponential work, and for any work where all places can be written at once.

    :param rate: jobs per second.
    :param batches_s: tau(1), tau(2), ... tau(b): the seconds that 1, 2, ... b jobs take together;
        for b servers that do not hinder each other, alpha each time.

    Source: a birth-death process of rates lambda and n / tau(n); insensitive under processor
    sharing.
    """
    _check(rate)
    _positive(batches_s)
    if places < 1:
        raise ValueError(f"a queue of {places} places")
    # 1 / P_K, by the recursion of Erlang's formula: everything stays between 1 and infinity.
    inverse = 1.0
    for n in range(1, places + 1):
        written = min(n, len(batches_s))
        ratio = rate * batches_s[written - 1] / written  # of P_n over P_(n-1)
        inverse = 1 + inverse / ratio if ratio else math.inf
    return 1 / inverse


def two_moment_blocking(load: float, scv: float, places: int) -> float:
    """MacGregor Smith's closed form for what :func:`blocking` computes: a reference to compare
    with. It is exact for scv = 1, and too low by whole factors where few are refused.

    Beyond the loads at which it is defined, it is what overload alone refuses.

    Source: J. MacGregor Smith, "Properties and performance modelling of finite buffer M/G/1/K
    networks", Computers & Operations Research 38 (2011) 740: with s = scv,
    r = sqrt(rho) (s - 1), D = 2 + r:
    P_K = (rho - 1) rho^((r + 2 K) / D) / (rho^(2 (1 + r + K) / D) - 1).
    """
    _check(load, scv)
    if places < 1:
        raise ValueError(f"a queue of {places} places")
    r = math.sqrt(load) * (scv - 1)
    over = 2 + r
    power = 2 * (1 + r + places) / over if over else 0.0
    if load == 0 or power <= 0 or over < 0:
        return max(0.0, 1 - 1 / load) if load else 0.0
    log = math.log(load)
    if abs(power * log) < 1e-9:  # 0 / 0; the limit at rho = 1
        return min(1.0, 1 / power)
    if power * log > 500:
        return 1 - 1 / load
    # rho^((r + 2 K) / D) = rho^(power - 1): 2 (1 + r + K) - (2 + r) = r + 2 K.
    value = (load - 1) * math.exp((power - 1) * log) / math.expm1(power * log)
    return min(max(value, 0.0), 1.0)


def all_let_in(blocked: float, proposers: int) -> float:
    """(1 - P_K)^k: the chance that none of k proposers refuses, each with ``blocked`` = P_K; about
    right where boards are many, since their queues are then nearly independent."""
    if not 0 <= blocked <= 1:
        raise ValueError(f"a probability of {blocked:g}")
    _check(proposers)
    return float((1 - blocked) ** proposers)


def _refused(load: float, scv: float, resume: float) -> Iterator[float]:
    """What :func:`blocking` says for 1, 2, ... places.

    A queue that departures leave empty with chance pi_0 serves a job every E[S] + pi_0 / lambda, so
    P_K = 1 - 1 / (pi_0 + rho). Without a share to resume at, states have weights u_n, that of 0
    being 1. If a job is refused f times (in the same units) by a queue that was open, and none is
    taken until R are left, each state K - 1 ... R + 1 of the closed queue weighs f. What flows down
    by those need not flow down by open states, which weigh u_n - f w_(n-R); and that so many do
    close it from the open ones says f = u_K / w_(K-R).
    """
    none = math.exp(-load) if scv < 1e-9 else math.exp(-math.log1p(load * scv) / scv)
    if none < 1 / CERTAIN:  # never empty once it has begun
        yield load / (1 + load)
        while True:
            yield 1 - 1 / load
    opened, closed = _weights(load, scv, none, 0), _weights(load, scv, none, 1)
    total = 1.0  # of u_0 ... u_(K-1)
    relieved, relief = [0.0], [0.0]  # sums of w_1 ... w_m, and w_m
    for places in count(1):
        left = max(0, min(math.ceil(resume * places), places) - 1)
        closed_states = places - 1 - left
        while len(relief) <= closed_states + 1:
            relief.append(next(closed))
            relieved.append(relieved[-1] + relief[-1])
        following = next(opened)  # u_K
        weight = total
        if closed_states and total < CERTAIN:
            refused = following / relief[closed_states + 1]
            weight += refused * (closed_states - relieved[closed_states])
        idle = 1 / weight if weight < CERTAIN else 0.0
        yield max(0.0, 1 - 1 / (idle + load)) if idle + load > 0 else 0.0
        total += following


def _weights(load: float, scv: float, none: float, least: float) -> Iterator[float]:
    """x_1, x_2, ... of x_(n+1) a_0 = max(P(A > n), least) + sum_(i=1..n) x_i P(A > n + 1 - i),
    where A arrive during a service and a_0 = P(A = 0) is ``none``.

    With 0 for ``least`` these are the weights u_n of n jobs left behind, since as many go up across
    each cut between n and n + 1 as go down; with 1, the w_n. Nothing is subtracted, so nothing is
    lost. The ratio of neighbours settles: from there on it is taken for constant.
    """
    spread = 1 + load * scv
    exactly, at_most = none, none  # P(A = n) and P(A <= n)
    above: list[float] = []  # P(A > 1), P(A > 2), ...
    weights: list[float] = []
    weight, ratio = 1.0, 0.0
    for n in range(CHAIN_PLACES):
        beyond = max(0.0, 1 - at_most)  # P(A > n)
        if n:
            above.append(beyond)
        newest = (max(beyond, least) + sum(map(mul, weights, reversed(above)))) / none
        weights.append(newest)
        settled = n and abs(newest - weight * ratio) <= SETTLED * newest
        weight, ratio = newest, newest / weight if weight else 0.0
        yield weight
        if settled or weight >= CERTAIN:
            break
        exactly *= load * (1 + n * scv) / ((n + 1) * spread)
        at_most += exactly
    while True:
        weight *= ratio
        yield weight


# --- arguments


def _check(*values: float) -> None:
    """None is negative or not a number."""
    for value in values:
        if not 0 <= value < math.inf:
            raise ValueError(f"{value:g} where a number of at least 0 is needed")


def _positive(values: Sequence[float], *, finite: bool = True) -> Sequence[float]:
    """The same, if there are any and all are above 0."""
    if not values or not all(value > 0 and (not finite or value < math.inf) for value in values):
        raise ValueError("a number above 0 is needed")
    return values
