"""One board's behaviour, event by event: what goes in, what comes out."""

from __future__ import annotations

from random import Random
from typing import Any, TypeVar

import msgspec
import pytest

from edgemoa.core import limits
from edgemoa.core.events import (
    Accepted,
    Aggregating,
    Answered,
    Effect,
    EngineInfo,
    Failed,
    Granted,
    LayerStarted,
    ProposalArrived,
    ProposerLeftOut,
    ReadAhead,
    Request,
    RequestEvent,
    Send,
    StartWork,
    StopWork,
    Tell,
    Text,
    TokenLogprob,
    Wishes,
    WorkDone,
    WorkFailed,
)
from edgemoa.core.load import Learned, UsualJob
from edgemoa.core.messages import (
    Alive,
    BoardId,
    Cancel,
    ChatMessage,
    Declined,
    Leave,
    Message,
    Proposal,
    Propose,
    Queued,
    Sampling,
)
from edgemoa.core.moa import Draft, Room, Synthesis, size_bytes
from edgemoa.core.node import Node, NodeSettings
from edgemoa.core.rates import DecodeRate, PrefillRate, Rates
from edgemoa.core.status import snapshot
from edgemoa.core.swim import REPORT_MS

ME, B, C, D = (BoardId(x) for x in ("me", "bb", "cc", "dd"))
ENGINE = EngineInfo("tiny", 2048, slots=1)
WHY = (ChatMessage("user", "Why?"),)
GONE_MS = 8_000  # more than it takes to find that a board is gone
PLENTY = Room(10_000)
T = TypeVar("T")


class Rig:
    """A node with a clock; the effects of each call are kept sorted by kind."""

    def __init__(self, *peers: BoardId, **settings: Any) -> None:
        self.now = 1_000
        self.node = Node(ME, NodeSettings(name="me", boot=1, **settings), Random(1))
        self.sent: list[tuple[BoardId, Message]] = []
        self.started: list[StartWork] = []
        self.stopped: list[int] = []
        self.ahead: list[ReadAhead] = []
        self.told: list[RequestEvent] = []
        for peer in peers:
            self.take(self.node.pair(peer, peer, self.now))
        self.take(self.node.engine_is_ready(ENGINE, self.now))
        for peer in peers:
            self.hear(peer)
        self.clear()

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to=to, message=message):
                    self.sent.append((to, message))
                case StartWork():
                    self.started.append(effect)
                case StopWork(job_id=job_id):
                    self.stopped.append(job_id)
                case ReadAhead():
                    self.ahead.append(effect)
                case Tell(event=event):
                    self.told.append(event)

    def clear(self) -> None:
        self.sent, self.started, self.stopped, self.told = [], [], [], []
        self.ahead = []

    def hear(self, peer: BoardId, sequence: int = 1, boot: int = 1, waiting: int = 0) -> None:
        alive = Alive(boot, sequence, peer, True, "tiny", waiting, 0, 0)
        self.take(self.node.receive(peer, alive, self.now))

    def ask(
        self,
        layers: int = 1,
        proposers: int = 2,
        name: str = "request-1",
        deadline_ms: int = 60_000,
        *,
        sampling: Sampling = Sampling(max_tokens=64),  # noqa: B008 - it is frozen
        wishes: Wishes = Wishes(),  # noqa: B008
        strict: bool = False,
        client: str = "",
    ) -> None:
        request = Request(
            name, WHY, 10, layers, proposers, sampling, deadline_ms, wishes, strict, client
        )
        self.take(self.node.submit(request, self.now))

    def done(self, text: str = "own", work_ms: int = 500, index: int = -1) -> None:
        job_id = self.started[index].job.job_id
        done = WorkDone(
            text, "stop", 10, len(text), work_ms // 2, work_ms - work_ms // 2, 4, work_ms // 3
        )
        self.take(self.node.finished(job_id, done, self.now))

    def propose(self, peer: BoardId, text: str = "theirs", layer: int = 1) -> None:
        proposal = Proposal("request-1", layer, text, "tiny", 10, 5, 3, 7, "stop")
        self.take(self.node.receive(peer, proposal, self.now))

    def messages(self, kind: type[T]) -> list[tuple[BoardId, T]]:
        return [(to, message) for to, message in self.sent if isinstance(message, kind)]

    def events(self, kind: type[T]) -> list[T]:
        return [event for event in self.told if isinstance(event, kind)]

    def one(self, kind: type[T]) -> T:
        (event,) = self.events(kind)
        return event

    def tick(self, later_ms: int, *heard: BoardId) -> None:
        self.now += later_ms
        for peer in heard:
            self.hear(peer, sequence=self.now)
        self.take(self.node.tick(self.now))

    def wait(self, later_ms: int) -> None:
        """Let time pass, with each tick at its time."""
        until_ms = self.now + later_ms
        while (due_ms := self.node.next_deadline_ms()) <= until_ms:
            self.now = max(due_ms, self.now)
            self.take(self.node.tick(self.now))
        self.now = until_ms


def test_algorithm_1_with_one_layer() -> None:
    rig = Rig(B, C)
    rig.ask()
    assert rig.one(Accepted).granted.proposers == 2
    assert set(rig.one(LayerStarted).boards) == {"me", "bb", "cc"}
    asked = rig.messages(Propose)
    assert {to for to, _ in asked} == {B, C}
    assert all(ask.messages == WHY and ask.layer == 1 for _, ask in asked)
    assert all(ask.sampling.temperature == 0.7 for _, ask in asked)
    assert asked[0][1].sampling.seed != asked[1][1].sampling.seed
    own = rig.started[0].job
    assert own.messages == WHY
    assert own.sampling.temperature == 0  # the owner's own proposal is greedy
    rig.propose(C, "see")
    rig.done("mine")
    assert not rig.events(Aggregating)
    rig.propose(B, "bee")
    assert rig.one(Aggregating).proposals == 3
    aggregation = rig.started[1].job
    text = aggregation.messages[-2].content
    assert text.index("see") < text.index("mine") < text.index("bee")
    rig.take(rig.node.wrote(aggregation.job_id, "Beca", rig.now))
    rig.take(rig.node.wrote(aggregation.job_id, "use.", rig.now))
    rig.done("Because.")
    answered = rig.one(Answered)
    assert "".join(event.text for event in rig.events(Text)) == answered.text == "Because."
    assert [p.board for p in answered.proposals] == ["cc", "me", "bb"]
    assert answered.left_out == ()
    assert rig.node.idle


def test_two_layers_feed_each_other() -> None:
    rig = Rig(B, C)
    rig.ask(layers=2, proposers=1)
    ((peer, first),) = rig.messages(Propose)
    rig.propose(peer, "first")
    rig.done("mine")
    second = rig.messages(Propose)[1][1]
    assert (second.layer, first.layer) == (2, 1)
    assert "first" in second.messages[-2].content
    assert "mine" in second.messages[-2].content
    other = rig.messages(Propose)[1][0]
    rig.propose(peer, "late repeat of layer 1")
    rig.propose(other, "second", layer=2)
    rig.done("mine too")
    text = rig.started[-1].job.messages[-2].content
    assert "second" in text
    assert "mine too" in text
    assert "first" not in text
    rig.done("Answer")
    assert [p.layer for p in rig.one(Answered).proposals] == [1, 1, 2, 2]


@pytest.mark.parametrize(("layers", "proposers"), [(0, 2), (1, 0), (0, 0)])
def test_a_plan_without_peers_is_the_board_alone(layers: int, proposers: int) -> None:
    rig = Rig(B)
    rig.ask(layers, proposers)
    assert rig.messages(Propose) == []
    assert rig.started[0].job.messages == WHY
    assert rig.started[0].job.stream
    rig.done("alone")
    assert rig.one(Answered).text == "alone"


def test_fewer_peers_than_asked_for_is_said() -> None:
    rig = Rig(B)
    rig.ask(proposers=5)
    granted = rig.one(Accepted).granted
    assert granted.proposers == 1
    assert "5" in granted.why
    rig = Rig()
    rig.ask(proposers=2)
    granted = rig.one(Accepted).granted
    assert (granted.layers, granted.proposers) == (0, 0)
    assert granted.why


@pytest.mark.parametrize("pick", ["uniform", "capacity", "shortest"])
def test_peers_that_are_alike_are_picked_alike(pick: str) -> None:
    picked = {B: 0, C: 0, D: 0}
    rig = Rig(B, C, D, pick=pick)
    for i in range(600):
        for peer in (B, C, D):
            rig.hear(peer, sequence=2 + i)
        rig.clear()
        rig.ask(proposers=1)
        picked[rig.messages(Propose)[0][0]] += 1
        rig.take(rig.node.cancel("request-1", rig.now))
    assert all(150 < n < 250 for n in picked.values())  # 200 +- 4 standard deviations


def test_a_peer_that_declines_is_replaced_while_there_is_another() -> None:
    rig = Rig(B, C)
    rig.ask(proposers=1)
    first, _ = rig.messages(Propose)[0]
    rig.take(rig.node.receive(first, Declined("request-1", 1, "full", 500), rig.now))
    assert rig.one(ProposerLeftOut).left_out.reason == "full"
    second, _ = rig.messages(Propose)[1]
    assert second != first
    rig.take(rig.node.undelivered(second, rig.messages(Propose)[1][1], rig.now))
    assert len(rig.messages(Propose)) == 2  # nobody is left to ask
    rig.done("mine")
    answered = rig.one(Answered)  # the owner's own proposal is the answer, not rewritten
    assert answered.text == "mine"
    assert answered.note
    assert [out.board for out in answered.left_out] == [first, second]


def test_a_layer_goes_on_at_its_deadline_and_calls_off_the_late() -> None:
    rig = Rig(B, C, layer_deadline_ms=5_000)
    rig.ask()
    rig.done("mine")
    rig.propose(B)
    rig.tick(4_999, B, C)
    assert not rig.events(Aggregating)
    rig.tick(1, B, C)
    assert [o.left_out.reason for o in rig.events(ProposerLeftOut)] == ["too late"]
    assert rig.messages(Cancel) == [(C, Cancel("request-1", 1))]
    assert rig.one(Aggregating).proposals == 2
    rig.propose(C, "after all")
    rig.done("Answer")
    assert len(rig.one(Answered).proposals) == 2


def test_the_owners_own_proposal_can_be_late_too() -> None:
    rig = Rig(B, layer_deadline_ms=5_000)
    rig.ask(proposers=1)
    own = rig.started[0].job.job_id
    rig.propose(B)
    rig.tick(5_000, B)
    assert rig.stopped == [own]
    assert "theirs" in rig.started[-1].job.messages[-2].content
    rig.take(rig.node.finished(own, WorkDone("late", "stop", 1, 1, 1, 1), rig.now))
    assert not rig.events(Answered)


def test_a_quorum_is_enough() -> None:
    rig = Rig(B, C, quorum=2)
    rig.ask()
    rig.propose(B)
    rig.done("mine")
    assert rig.one(Aggregating).proposals == 2
    assert rig.messages(Cancel) == [(C, Cancel("request-1", 1))]


@pytest.mark.parametrize("how", ["leave", "silence", "restart", "unpair"])
def test_a_dead_peer_never_hangs_a_prompt(how: str) -> None:
    rig = Rig(B)
    rig.ask(proposers=1)
    rig.done("mine")
    match how:
        case "leave":
            rig.take(rig.node.receive(B, Leave(1), rig.now))
        case "silence":
            rig.wait(GONE_MS)
        case "restart":
            rig.hear(B, boot=2)
        case "unpair":
            rig.take(rig.node.unpair(B, rig.now))
    assert rig.one(Answered).text == "mine"
    assert rig.one(ProposerLeftOut).left_out.board == "bb"


def test_an_empty_proposal_is_left_out_not_passed_on() -> None:
    rig = Rig(B, C)
    rig.ask()
    rig.propose(B, "<think>what now</think>")
    rig.propose(C, "something")
    rig.done("mine")
    assert rig.one(ProposerLeftOut).left_out.reason == "wrote nothing"
    assert rig.one(Aggregating).proposals == 2


def test_the_deadline_gives_the_best_at_hand() -> None:
    rig = Rig(B)
    rig.ask(proposers=1, deadline_ms=10_000)
    rig.done("mine")
    rig.propose(B)
    rig.tick(10_000, B)
    answered = rig.one(Answered)
    assert answered.text == "mine"
    assert "deadline" in answered.note
    assert len(rig.stopped) == 1
    assert rig.node.idle


def test_the_deadline_keeps_what_has_been_told() -> None:
    rig = Rig()
    rig.ask(0, 0, deadline_ms=10_000)
    rig.take(rig.node.wrote(rig.started[0].job.job_id, "Because", rig.now))
    rig.tick(10_000)
    answered = rig.one(Answered)
    assert (answered.text, answered.finish) == ("Because", "deadline")


def test_the_deadline_with_nothing_is_an_error() -> None:
    rig = Rig()
    rig.ask(0, 0, deadline_ms=10_000)
    rig.tick(10_000)
    assert rig.one(Failed).code == "deadline_exceeded"


def test_own_prompts_are_bounded_and_the_refusal_says_when() -> None:
    rig = Rig(own_requests=2)
    for i in range(3):
        rig.ask(name=f"request-{i}")
    failed = rig.one(Failed)
    assert failed.code == "overloaded"
    assert failed.retry_after_ms >= 1_000
    assert len(rig.node.runs) == 2


def test_a_used_request_id_is_a_defect_of_the_caller() -> None:
    rig = Rig()
    rig.ask()
    with pytest.raises(ValueError, match="used once"):
        rig.ask()


def test_the_client_going_away_stops_everything() -> None:
    rig = Rig(B, C)
    rig.ask()
    rig.take(rig.node.cancel("request-1", rig.now))
    assert rig.stopped == [rig.started[0].job.job_id]
    assert {to for to, _ in rig.messages(Cancel)} == {B, C}
    assert rig.node.idle
    rig.take(rig.node.cancel("request-1", rig.now))  # harmless


# --- what is read ahead


def roomy(rig: Rig, slots: int = 2) -> Rig:
    rig.take(rig.node.engine_is_ready(EngineInfo("tiny", 2048, slots), rig.now))
    return rig


def begun(*texts: str) -> ReadAhead:
    messages = Synthesis().begin(WHY, [Draft(B, text, 5, own=False) for text in texts], PLENTY)
    return ReadAhead("request-1", messages)


def test_proposals_are_read_as_they_arrive_and_no_further_once_the_answer_is_begun() -> None:
    rig = roomy(Rig(B, C, D))
    rig.ask(1, 3)
    rig.propose(B, "from B")
    rig.propose(B, "from B")  # repeated
    assert rig.ahead == [begun("from B")]
    rig.done("own")
    rig.propose(C, "")  # left out
    assert rig.ahead[1:] == [begun("from B", "own")]
    rig.propose(D, "from D")
    assert rig.ahead[2:] == [ReadAhead("request-1")]
    assert rig.started[-1].job.messages[:1] == WHY
    assert rig.started[-1].job.messages[1].content.startswith(rig.ahead[1].messages[1].content)


def test_the_answer_that_waits_lets_the_reading_go_on() -> None:
    rig = roomy(Rig(B, C, discipline="fcfs"))
    rig.ask(1, 2)
    rig.propose(B, "from B")
    for n in range(2):
        rig.take(rig.node.receive(B, proposal_for(B, f"request-{n + 5}"), rig.now))
    assert len(rig.started) == 2
    rig.propose(C, "from C")
    rig.done("own", index=0)
    assert rig.ahead == [begun("from B")]  # for it, there was no slot any more
    rig.done("theirs", index=1)
    assert rig.started[-1].job.kind == "aggregation"
    assert rig.ahead == [begun("from B"), ReadAhead("request-1")]


def test_nothing_is_read_ahead_where_every_slot_is_taken() -> None:
    rig = Rig(B, C)
    rig.ask(1, 2)
    rig.propose(B, "from B")  # the one slot writes the own proposal
    assert not rig.ahead
    rig.done("own")
    assert rig.ahead == [begun("from B", "own")]


def test_the_next_layer_is_read_ahead_of_too() -> None:
    rig = roomy(Rig(B, C))
    rig.ask(2, 2)
    rig.propose(B, "from B")
    rig.propose(C, "from C")
    rig.done("own")
    assert rig.ahead == [begun("from B"), begun("from B", "from C"), ReadAhead("request-1")]
    rig.propose(C, "C once more", layer=2)
    assert rig.ahead[3:] == [begun("C once more")]


@pytest.mark.parametrize("how", ["cancelled", "deadline", "stopped", "too late"])
def test_the_reading_ends_with_the_prompt(how: str) -> None:
    rig = roomy(Rig(B, C, layer_deadline_ms=3_000))
    rig.ask(1, 2, deadline_ms=60_000 if how == "too late" else 2_000)
    rig.propose(B, "from B")
    match how:
        case "cancelled":
            rig.take(rig.node.cancel("request-1", rig.now))
        case "stopped":
            rig.take(rig.node.stop(rig.now))
        case _:
            rig.tick(3_100)
    assert rig.ahead == [begun("from B"), ReadAhead("request-1")]


def test_a_model_process_that_died_has_nothing_to_forget() -> None:
    rig = roomy(Rig(B, C))
    rig.ask(1, 2)
    rig.propose(B, "from B")
    rig.take(rig.node.engine_is_lost(rig.now))
    rig.take(rig.node.cancel("request-1", rig.now))
    assert rig.ahead == [begun("from B")]
    roomy(rig)
    rig.ask(1, 2, name="request-2")
    rig.take(rig.node.engine_is_lost(rig.now))
    rig.take(rig.node.receive(B, theirs("request-2"), rig.now))
    assert len(rig.ahead) == 1  # nor anybody to read


def test_a_strategy_may_tell_nothing() -> None:
    class Silent(Synthesis):
        def begin(self, *_: object) -> tuple[ChatMessage, ...]:
            return ()

    rig = roomy(Rig(B, C, strategy=Silent()))
    rig.ask(1, 2)
    rig.propose(B, "from B")
    rig.take(rig.node.cancel("request-1", rig.now))
    assert not rig.ahead


# --- where time and tokens went


def theirs(name: str = "request-1", **more: int) -> Proposal:
    return Proposal(name, 1, "theirs", "tiny", 10, 5, 3, 7, "stop", **more)


def test_every_job_says_what_it_read_and_where_its_time_went() -> None:
    rig = Rig(B)
    rig.ask(1, 1)
    rig.now += 700
    rig.done("own", work_ms=500)
    honest = theirs(cached_tokens=6, prefill_ms=2, model_ms=4)
    rig.take(rig.node.receive(B, honest, rig.now))
    rig.now += 900
    rig.done("the answer", work_ms=600)
    answered = rig.one(Answered)
    own, other = answered.proposals
    assert (own.cached_tokens, own.queue_ms, own.prefill_ms, own.model_ms) == (4, 200, 250, 166)
    assert (other.cached_tokens, other.prefill_ms, other.model_ms) == (6, 2, 4)
    assert (answered.job_tokens, answered.cached_tokens) == (10, 4)
    assert (answered.queue_ms, answered.prefill_ms, answered.model_ms) == (300, 300, 200)


def test_a_peer_that_claims_more_than_can_be_is_cut_down() -> None:
    rig = Rig(B)
    rig.ask(1, 1)
    liar = theirs(cached_tokens=2**31, prefill_ms=2**40, model_ms=2**40)
    rig.take(rig.node.receive(B, liar, rig.now))
    record = rig.one(ProposalArrived).proposal
    assert (record.cached_tokens, record.prefill_ms) == (10, 7)


def test_what_a_wait_is_expected_to_be_follows_the_engines_rates() -> None:
    rig = roomy(Rig(B))
    rig.ask(0, 0)
    rig.done(work_ms=900)
    rig.ask(0, 0, name="request-2")
    assert rig.node.queue.expected_wait_ms(rig.now, own=True) == 300  # its share, the last time
    rates = Rates((PrefillRate(100, 2.0),), (DecodeRate(1, 100, 10.0),))
    rig.node.measured(rates)
    wait_ms = rig.node.queue.expected_wait_ms(rig.now, own=True)
    assert wait_ms == pytest.approx(6 * 2 + 3 * 10, rel=0.03)
    assert snapshot(rig.node, rig.now).rates == rates


# --- as a proposer


def proposal_for(peer: BoardId, name: str = "request-9", layer: int = 1) -> Propose:
    return Propose(name, layer, WHY, Sampling(max_tokens=32), 30_000)


def test_a_peers_job_is_queued_done_and_answered() -> None:
    rig = Rig(B)
    rig.ask(0, 0)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    assert rig.messages(Queued)[0][1].position == 1
    rig.now += 100
    rig.done("own answer")
    rig.now += 400
    rig.done("for bee", work_ms=400)
    ((to, proposal),) = rig.messages(Proposal)
    assert to == B
    assert (proposal.text, proposal.queue_ms, proposal.work_ms) == ("for bee", 100, 400)


def test_a_repeated_question_is_not_computed_again() -> None:
    rig = Rig(B)
    for _ in range(2):
        rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    assert len(rig.started) == 1
    assert len(rig.messages(Queued)) == 2
    rig.done("once")
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    assert len(rig.started) == 1
    assert [m.text for _, m in rig.messages(Proposal)] == ["once", "once"]


def test_called_off_work_stops_and_is_not_begun_again() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.take(rig.node.receive(B, Cancel("request-9", 1), rig.now))
    assert rig.stopped == [rig.started[0].job.job_id]
    rig.take(rig.node.receive(B, Cancel("request-8", 1), rig.now))  # overtakes its question
    rig.take(rig.node.receive(B, proposal_for(B, "request-8"), rig.now))
    assert len(rig.started) == 1
    assert rig.node.idle


def test_peers_jobs_are_bounded_and_so_is_their_prompt() -> None:
    rig = Rig(B, peer_jobs=2)
    for i in range(3):
        rig.take(rig.node.receive(B, proposal_for(B, f"request-{i}"), rig.now))
    assert rig.node.peer_jobs() == 2
    assert "full" in rig.messages(Declined)[0][1].reason
    rig = Rig(B)
    large = (ChatMessage("user", "x" * limits.MAX_PROMPT_BYTES), *WHY)
    rig.take(rig.node.receive(B, Propose("request-9", 1, large, Sampling(), 1_000), rig.now))
    assert "too large" in rig.messages(Declined)[0][1].reason


def test_a_full_queue_of_peers_does_not_keep_the_owner_out() -> None:
    rig = Rig(B, peer_jobs=2)
    for i in range(3):
        rig.take(rig.node.receive(B, proposal_for(B, f"request-{i}"), rig.now))
    rig.ask(0, 0)
    assert rig.one(Accepted).position == 2


def test_a_dead_owners_work_stops() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.wait(GONE_MS)
    assert rig.stopped == [rig.started[0].job.job_id]


def test_work_that_is_too_late_is_dropped_without_a_word() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.tick(30_000, B)
    assert len(rig.stopped) == 1
    assert rig.messages(Proposal) == []
    assert rig.messages(Declined) == []


def test_an_orphaned_job_is_called_off() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, Queued("request-of-last-boot", 1, 0, 0), rig.now))
    assert rig.messages(Cancel) == [(B, Cancel("request-of-last-boot", 1))]


def test_a_stranger_is_not_listened_to() -> None:
    rig = Rig()
    rig.take(rig.node.receive(D, proposal_for(D), rig.now))
    assert (rig.sent, rig.started) == ([], [])


# --- the engine fails


def test_what_the_model_died_on_is_tried_once_more() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.take(rig.node.engine_is_lost(rig.now))
    assert len(rig.started) == 1
    rig.take(rig.node.engine_is_ready(ENGINE, rig.now))
    assert len(rig.started) == 2
    rig.take(rig.node.engine_is_lost(rig.now))
    assert "died" in rig.messages(Declined)[0][1].reason
    rig.take(rig.node.engine_is_ready(ENGINE, rig.now))
    assert len(rig.started) == 2


def test_a_stream_goes_on_where_it_was_after_the_model_died() -> None:
    rig = Rig()
    rig.ask(0, 0)
    rig.take(rig.node.wrote(rig.started[0].job.job_id, "Because of", rig.now))
    rig.take(rig.node.engine_is_lost(rig.now))
    rig.take(rig.node.engine_is_ready(ENGINE, rig.now))
    again = rig.started[1].job.job_id
    for piece in ("Beca", "use of th", "e air"):
        rig.take(rig.node.wrote(again, piece, rig.now))
    rig.done("Because of the air.")
    assert "".join(t.text for t in rig.events(Text)) == rig.one(Answered).text


def test_a_stream_that_would_change_what_was_told_fails() -> None:
    rig = Rig()
    rig.ask(0, 0)
    rig.take(rig.node.wrote(rig.started[0].job.job_id, "Because of", rig.now))
    rig.take(rig.node.engine_is_lost(rig.now))
    rig.take(rig.node.engine_is_ready(ENGINE, rig.now))
    rig.done("Since the air")
    assert rig.one(Failed).code == "engine_failed"
    assert "".join(t.text for t in rig.events(Text)) == "Because of"


def test_an_aggregation_that_fails_gives_a_proposal_instead() -> None:
    rig = Rig(B)
    rig.ask(proposers=1)
    rig.done("mine")
    rig.propose(B)
    rig.take(rig.node.failed(rig.started[-1].job.job_id, WorkFailed("broken"), rig.now))
    answered = rig.one(Answered)
    assert answered.text == "mine"
    assert "broken" in answered.note


def test_an_aggregation_over_the_context_is_tried_with_less() -> None:
    rig = Rig(B)
    rig.ask(proposers=1)
    rig.done("mine " * 200)
    rig.propose(B, "theirs " * 200)
    lengths = []
    for _ in range(3):
        job = rig.started[-1].job
        lengths.append(len(job.messages[-2].content))
        rig.take(rig.node.failed(job.job_id, WorkFailed("too long", code="context"), rig.now))
    assert lengths == sorted(lengths, reverse=True)
    rig.done("Answer")
    assert rig.one(Answered).text == "Answer"


def test_a_prompt_over_the_context_is_an_error_of_its_own() -> None:
    rig = Rig()
    rig.ask(0, 0)
    job_id = rig.started[0].job.job_id
    rig.take(rig.node.failed(job_id, WorkFailed("too long", code="context"), rig.now))
    assert rig.one(Failed).code == "context_length_exceeded"


def test_an_answer_that_cannot_be_held_to_its_schema_is_an_error_of_its_own() -> None:
    rig = Rig()
    rig.ask(0, 0)
    job_id = rig.started[0].job.job_id
    rig.take(rig.node.failed(job_id, WorkFailed("too complex", code="schema"), rig.now))
    assert rig.one(Failed).code == "schema_failed"


def test_nothing_is_taken_from_peers_while_the_model_is_away() -> None:
    rig = Rig(B)
    rig.take(rig.node.engine_is_lost(rig.now))
    assert not rig.messages(Alive)[-1][1].accepting
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    assert rig.messages(Declined)[0][1].reason


# --- coming and going


def test_reports_are_told_when_there_is_something_new_and_not_echoed() -> None:
    rig = Rig(B, C)
    rig.wait(5 * REPORT_MS)
    rig.hear(B, 2)
    rig.hear(C, 2)
    rig.clear()
    rig.hear(B, sequence=9)
    assert rig.sent == []
    rig.ask(0, 0)
    rig.wait(REPORT_MS)
    assert {to for to, _ in rig.messages(Alive)} == {B, C}
    assert {alive.running for _, alive in rig.messages(Alive)} == {1}
    assert rig.node.next_deadline_ms() <= rig.now + REPORT_MS


def test_a_link_says_who_is_there_and_which_boot_of_it() -> None:
    rig = Rig()
    rig.take(rig.node.pair(B, B, rig.now))
    assert rig.sent == []
    rig.take(rig.node.linked(B, 1, rig.now))
    assert rig.messages(Alive)[0][0] == B
    rig.hear(B)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.take(rig.node.linked(B, 1, rig.now))  # another link to the same boot
    assert rig.stopped == []
    rig.take(rig.node.linked(B, 2, rig.now))
    assert rig.stopped == [rig.started[0].job.job_id]
    rig.take(rig.node.linked(C, 1, rig.now))  # not paired
    rig.take(rig.node.unlinked(C, rig.now))


def test_a_board_without_a_link_is_not_picked_and_then_not_waited_for() -> None:
    rig = Rig(B)
    rig.ask(proposers=1)
    rig.done("mine")
    rig.take(rig.node.unlinked(B, rig.now))
    assert rig.node.members.usable() == []
    assert not rig.events(Answered)
    rig.wait(GONE_MS)
    assert rig.one(Answered).text == "mine"


def test_draining_hands_back_what_has_not_begun_and_finishes_the_rest() -> None:
    rig = Rig(B)
    rig.ask(0, 0)
    for name in ("request-8", "request-9"):
        rig.take(rig.node.receive(B, proposal_for(B, name), rig.now))
    rig.take(rig.node.drain(rig.now))
    assert [d.request_id for _, d in rig.messages(Declined)] == ["request-8", "request-9"]
    assert not rig.messages(Alive)[-1][1].accepting
    rig.ask(name="request-2")
    assert rig.one(Failed).code == "unavailable"
    rig.done("finished")
    assert rig.one(Answered).text == "finished"
    assert rig.node.idle
    rig.take(rig.node.stop(rig.now))
    assert rig.messages(Leave) == [(B, Leave(1))]


def test_stopping_gives_everyone_a_last_word() -> None:
    rig = Rig(B, C)
    rig.ask()
    rig.done("mine")
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.take(rig.node.stop(rig.now))
    assert rig.one(Answered).text == "mine"  # better than nothing
    assert [d.request_id for _, d in rig.messages(Declined)] == ["request-9"]
    assert {to for to, _ in rig.messages(Leave)} == {B, C}
    assert rig.node.idle


def test_bounded_memory_of_results() -> None:
    rig = Rig(B)
    for i in range(limits.MAX_REMEMBERED_RESULTS + 50):
        rig.take(rig.node.receive(B, Cancel(f"request-{i}", 1), rig.now))
    assert len(rig.node._results[B]) == limits.MAX_REMEMBERED_RESULTS


def test_one_board_cannot_make_another_ones_result_forgotten() -> None:
    rig = Rig(B, C)
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    rig.done("for bee")
    for i in range(limits.MAX_REMEMBERED_RESULTS + 50):
        rig.take(rig.node.receive(C, Cancel(f"request-{i}", 1), rig.now))
    rig.take(rig.node.receive(B, Cancel("request-9", 1), rig.now))
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    assert len(rig.started) == 1
    assert [m.text for _, m in rig.messages(Proposal)] == ["for bee", "for bee"]


def test_one_board_cannot_take_every_place_nor_for_ever() -> None:
    rig = Rig(B, C, peer_jobs=4, proposal_max_tokens=100)
    endless = Propose("x" * 8, 1, WHY, Sampling(max_tokens=30_000), 2**40)
    for i in range(4):
        ask = msgspec.structs.replace(endless, request_id=f"request-{i}")
        rig.take(rig.node.receive(B, ask, rig.now))
    assert rig.node.peer_jobs() == 2
    assert rig.started[0].job.sampling.max_tokens == 100
    rig.take(rig.node.receive(C, proposal_for(C), rig.now))
    assert rig.node.peer_jobs() == 3
    rig.tick(limits.MAX_PEER_JOB_MS, B, C)
    assert rig.node.idle


@pytest.mark.parametrize(
    ("sampling", "text", "given"),
    [
        (Sampling(max_tokens=64), "one two", True),
        (Sampling(max_tokens=3), "one two", False),  # 7 tokens, by this rig's count
        (Sampling(max_tokens=64, stop=("two",)), "one two", False),
        (Sampling(max_tokens=64, stop=("three",)), "one two", True),
        (Sampling(max_tokens=64, temperature=0.9), "one two", False),
    ],
)
def test_the_own_proposal_is_the_answer_only_where_it_would_have_been_written(
    sampling: Sampling, text: str, *, given: bool
) -> None:
    rig = Rig(B)
    rig.ask(proposers=1, sampling=sampling)
    rig.take(rig.node.receive(B, Declined("request-1", 1, "full"), rig.now))
    rig.done(text)
    if given:
        assert rig.one(Answered).text == text
    else:
        assert rig.started[-1].job.sampling == sampling
        assert rig.started[-1].job.messages == WHY
        rig.done("as asked")
        assert "no peer" in rig.one(Answered).note


WISHES = [Wishes(schema="{}"), Wishes(logit_bias={5: 1.0}), Wishes(logprobs=0)]


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_wishes_are_for_the_answer_alone(wishes: Wishes) -> None:
    rig = Rig(B)
    rig.ask(proposers=1, wishes=wishes)
    assert not rig.started[0].job.wishes
    rig.propose(B)
    rig.done("mine")
    assert rig.started[1].job.wishes == wishes
    rig.done("{}")
    assert rig.one(Answered).text == "{}"


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_what_was_written_without_the_wishes_is_not_the_answer(wishes: Wishes) -> None:
    rig = Rig(B)
    rig.ask(proposers=1, wishes=wishes)
    rig.done("mine")
    rig.take(rig.node.receive(B, Declined("request-1", 1, "no"), rig.now))
    job = rig.started[1].job  # not given as it is, although nothing else is at hand
    assert (job.messages, job.wishes) == (WHY, wishes)
    rig.take(rig.node.failed(job.job_id, WorkFailed("broken"), rig.now))
    assert rig.one(Failed).code == "engine_failed"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=0.1),
        Sampling(frequency_penalty=-0.1),
    ],
)
def test_a_proposal_without_penalties_is_not_the_answer_with_them(sampling: Sampling) -> None:
    rig = Rig(B)
    rig.ask(proposers=1, sampling=sampling)
    rig.done("mine")
    rig.take(rig.node.receive(B, Declined("request-1", 1, "no"), rig.now))
    assert rig.started[1].job.sampling == sampling


def test_logprobs_are_told_once_each_also_after_a_restart() -> None:
    def told(*numbers: int) -> tuple[TokenLogprob, ...]:
        return tuple(TokenLogprob(b"%d" % n, -1.0) for n in numbers)

    rig = Rig()
    rig.ask(0, 0, wishes=Wishes(logprobs=0))
    job_id = rig.started[0].job.job_id
    rig.take(rig.node.wrote(job_id, "12", rig.now, told(1, 2)))
    rig.take(rig.node.engine_is_lost(rig.now))
    rig.take(rig.node.engine_is_ready(ENGINE, rig.now))
    again = rig.started[1].job.job_id
    for piece, numbers in (("1", [1]), ("23", [2, 3]), ("", [4])):
        rig.take(rig.node.wrote(again, piece, rig.now, told(*numbers)))
    rig.done("123")
    texts = rig.events(Text)
    assert "".join(event.text for event in texts) == "123"
    assert tuple(each for event in texts for each in event.logprobs) == told(1, 2, 3, 4)


def test_a_proposal_given_for_want_of_better_keeps_to_what_was_asked() -> None:
    rig = Rig(B)
    rig.ask(proposers=1, sampling=Sampling(max_tokens=64, stop=("two",)))
    rig.done("one two three")
    rig.propose(B)
    rig.take(rig.node.failed(rig.started[-1].job.job_id, WorkFailed("broken"), rig.now))
    assert rig.one(Answered).text == "one "


def test_an_empty_aggregation_is_no_answer() -> None:
    rig = Rig(B)
    rig.ask(proposers=1)
    rig.done("mine")
    rig.propose(B)
    rig.done(" \n")
    answered = rig.one(Answered)
    assert answered.text == "mine"
    assert "empty" in answered.note


def test_proposals_that_lie_about_their_length_cost_the_peer_and_not_the_prompt() -> None:
    rig = Rig(B, C)
    rig.ask(layers=2, proposers=2)
    vast = "a" + "\n" * (limits.MAX_PROPOSAL_BYTES - 2) + "b"
    for peer in (B, C):
        liar = Proposal("request-1", 1, vast, "m", 0, 0, 0, 0, "stop")
        rig.take(rig.node.receive(peer, liar, rig.now))
    rig.done("mine")
    for _, ask in rig.messages(Propose):
        assert size_bytes(ask.messages) <= limits.MAX_PROMPT_BYTES
    rig.done("mine again")
    for peer in (B, C):
        liar = Proposal("request-1", 2, vast, "m", 0, 0, 0, 0, "stop")
        rig.take(rig.node.receive(peer, liar, rig.now))
    # Should the model find it too long all the same, it is asked again with less, down to nothing.
    sizes = []
    while not rig.events(Answered):
        job = rig.started[-1].job
        sizes.append(size_bytes(job.messages))
        rig.take(rig.node.failed(job.job_id, WorkFailed("too long", code="context"), rig.now))
    assert sizes[0] <= limits.MAX_PROMPT_BYTES
    assert sizes == sorted(sizes, reverse=True)
    assert rig.one(Answered).text == "mine again"


def test_a_later_layer_with_fewer_boards_says_so() -> None:
    rig = Rig(B, C)
    rig.ask(layers=2, proposers=2)
    rig.propose(B)
    rig.propose(C)
    rig.take(rig.node.receive(C, Leave(1), rig.now))
    rig.done("mine")
    rig.propose(B, "second", layer=2)
    rig.done("mine too")
    rig.done("Answer")
    assert rig.one(Answered).note == "layer 2 had 1 of 2 proposers"


def test_nothing_is_said_after_the_last_word() -> None:
    rig = Rig(B)
    rig.take(rig.node.stop(rig.now))
    rig.clear()
    rig.tick(REPORT_MS)
    assert rig.sent == []


# --- what is taken, and with which plan


def learned(model_ms: float = 1_000, model: str = "tiny") -> Learned:
    jobs = (
        UsualJob("proposal", model_ms, 0.3, 50, 0, 20),
        UsualJob("aggregation", 2 * model_ms, 0.3, 200, 0, 30),
    )
    return Learned(model, jobs)


def report(board: str, sequence: int = 9, **figures: int) -> Alive:
    usual = {"expected_wait_ms": 0, "aggregation_ms": 2 * figures.get("proposal_ms", 0)}
    return Alive(1, sequence, board, True, "tiny", 0, 0, **{**usual, **figures})


def test_what_was_learned_at_an_earlier_start_holds_for_the_same_model() -> None:
    rig = Rig(B, learned=learned(7_000))
    assert rig.node.outlook(rig.now).proposal_ms == 7_000
    assert rig.node.report(rig.now).proposal_ms == 7_000
    assert rig.node.learned() == learned(7_000)
    assert Rig(B, learned=learned(7_000, "other")).node.learned() is None


def test_a_promise_that_cannot_be_kept_is_not_made() -> None:
    rig = Rig(learned=learned(10_000), promise_ms=60_000)
    for i in range(6):
        rig.ask(0, 0, name=f"request-{i}", deadline_ms=600_000)
    failed = rig.events(Failed)[0]
    assert failed.code == "overloaded"
    assert failed.position == len(rig.node.runs) < 6
    assert failed.retry_after_ms >= 5_000
    rig = Rig(learned=learned(100_000), promise_ms=60_000)
    rig.ask(0, 0)  # a slow board that is idle is better than none
    assert not rig.events(Failed)


def test_once_full_some_is_worked_off_before_more_is_taken() -> None:
    rig = Rig(own_requests=4)
    for i in range(5):
        rig.ask(0, 0, name=f"request-{i}")
    assert rig.one(Failed).position == 4
    for _ in range(2):
        rig.done()
        assert rig.node.refusal(rig.now) is not None
    rig.done()
    assert rig.node.refusal(rig.now) is None


def test_when_to_come_back_follows_from_what_has_to_be_worked_off() -> None:
    rig = Rig(own_requests=8, learned=learned(3_000))
    for i in range(9):
        rig.ask(0, 0, name=f"request-{i}", deadline_ms=600_000)
    failed = rig.one(Failed)
    assert failed.retry_after_ms == 6 * 3_000  # down to 2 of 8
    for _ in range(6):
        assert rig.node.refusal(rig.now) is not None
        rig.now += 3_000
        rig.done()
    assert rig.node.refusal(rig.now) is None


def test_who_wants_it_strictly_is_refused_instead_of_given_less() -> None:
    rig = Rig(B)
    rig.ask(1, 2, strict=True)
    failed = rig.one(Failed)
    assert failed.code == "overloaded"
    assert "1 at hand" in failed.reason
    assert not rig.node.runs
    rig.clear()
    rig.ask(1, 1, strict=True, name="request-2")
    assert rig.one(Accepted).granted == Granted(1, 1)


def test_a_full_peer_is_not_asked_and_less_is_granted() -> None:
    rig = Rig(B, C, learned=learned())
    full = {"expected_wait_ms": 9_000, "proposal_ms": 1_000, "utilisation_permille": 1_300}
    rig.take(rig.node.receive(C, report("cc", **full), rig.now))
    rig.ask(1, 2)
    accepted = rig.one(Accepted)
    assert accepted.granted == Granted(1, 1, "1 of 2 boards are full")
    assert accepted.expected_ms > 0
    assert [to for to, _ in rig.messages(Propose)] == [B]
    assert rig.node.counters.degraded == 1


def test_who_would_be_done_first_is_asked_counting_what_was_given_since() -> None:
    rig = Rig(B, C, D)
    for board, wait_ms in ((B, 0), (C, 2_500), (D, 90_000)):
        figures = {"expected_wait_ms": wait_ms, "proposal_ms": 1_000}
        rig.take(rig.node.receive(board, report(board, **figures), rig.now))
    asked = []
    for i in range(4):
        rig.clear()
        rig.ask(1, 1, name=f"request-{i}")
        asked.append(rig.messages(Propose)[0][0])
    assert asked[:2] == [B, B]
    assert C in asked[2:]
    assert D not in asked
    rig.take(rig.node.receive(B, report("bb", 10, proposal_ms=1_000), rig.now))  # it has caught up
    rig.clear()
    rig.ask(1, 1, name="request-9")
    assert rig.messages(Propose)[0][0] == B


def test_a_slow_owner_leaves_proposing_to_its_peers() -> None:
    for how, proposes in (("auto", 0), ("always", 1)):
        rig = Rig(B, C, learned=learned(30_000), own_proposal=how)
        for board in (B, C):
            rig.take(rig.node.receive(board, report(board, proposal_ms=1_000), rig.now))
        rig.ask(1, 2, deadline_ms=600_000)
        assert len(rig.started) == proposes
        assert rig.one(LayerStarted).boards == ("me", "bb", "cc")[1 - proposes :]
        rig.propose(B, "from B")
        rig.propose(C, "from C")
        if proposes:
            rig.done("own")
        assert rig.started[-1].job.kind == "aggregation"
        rig.done("all of it")
        assert rig.one(Answered).text == "all of it"


def test_the_aggregation_goes_to_a_board_that_is_much_faster() -> None:
    rig = Rig(B, C, learned=learned(30_000), aggregator="auto", own_proposal="always",
              proposal_max_tokens=16)  # fmt: skip
    for board, wait_ms in ((B, 20_000), (C, 0)):
        figures = {"proposal_ms": 1_000, "expected_wait_ms": wait_ms}
        rig.take(rig.node.receive(board, report(board, **figures), rig.now))
    rig.ask(1, 2, deadline_ms=600_000)
    rig.propose(B, "from B")
    rig.propose(C, "from C")
    rig.done("own")
    to, question = rig.messages(Propose)[-1]
    assert (to, question.layer, question.is_answer) == (C, 2, True)
    assert question.sampling == Sampling(max_tokens=64)  # the user's, not a proposal's
    assert rig.one(Aggregating) == Aggregating(3, "cc")
    long = "the answer " * 90
    rig.propose(C, long, layer=2)  # longer than a proposal may be here
    answered = rig.one(Answered)
    assert (answered.text, answered.note) == (long.strip(), "")
    assert rig.node.idle


@pytest.mark.parametrize("how", ["declined", "gone", "late", "empty"])
def test_an_aggregation_that_does_not_come_is_written_here(how: str) -> None:
    rig = Rig(B, learned=learned(9_000), aggregator="strongest", layer_deadline_ms=20_000)
    rig.take(rig.node.receive(B, report("bb", proposal_ms=1_000), rig.now))
    rig.ask(1, 1, deadline_ms=600_000)
    rig.propose(B, "from B")
    rig.done("own")
    assert rig.messages(Propose)[-1][1].is_answer
    match how:
        case "declined":
            rig.take(rig.node.receive(B, Declined("request-1", 2, "busy"), rig.now))
        case "gone":
            rig.take(rig.node.receive(B, Leave(1), rig.now))
        case "late":
            for _ in range(21):
                rig.tick(1_000, B)
        case _:
            rig.propose(B, "", layer=2)
    assert rig.started[-1].job.kind == "aggregation"
    assert "from B" in rig.started[-1].job.messages[-2].content
    rig.done("here")
    assert rig.one(Answered).text == "here"


def test_what_was_wished_for_is_written_by_the_owner() -> None:
    rig = Rig(B, learned=learned(30_000), aggregator="strongest", own_proposal="always")
    rig.take(rig.node.receive(B, report("bb", proposal_ms=1_000), rig.now))
    rig.ask(1, 1, deadline_ms=600_000, wishes=Wishes(schema="{}"))
    rig.propose(B, "from B")
    rig.done("own")
    assert rig.started[-1].job.kind == "aggregation"


def test_an_answer_for_a_peer_may_be_as_long_as_one_of_its_own() -> None:
    rig = Rig(B, proposal_max_tokens=100, answer_max_tokens=300)
    for layer, is_answer, most in ((1, False, 100), (2, True, 300)):
        ask = Propose("request-9", layer, WHY, Sampling(max_tokens=2_000), 9_000, is_answer)
        rig.take(rig.node.receive(B, ask, rig.now))
        assert rig.started[-1].job.sampling.max_tokens == most
        rig.done()


def test_a_peers_job_that_would_come_too_late_is_declined_at_once() -> None:
    rig = Rig(B, C, learned=learned(10_000))
    for i in range(3):
        ask = Propose(f"request-{i}", 1, WHY, Sampling(), 25_000)
        rig.take(rig.node.receive((B, C)[i % 2], ask, rig.now))
    ((to, declined),) = rig.messages(Declined)
    assert to == B
    assert declined.request_id == "request-2"
    assert declined.retry_after_ms > 10_000


def test_a_peers_job_whose_turn_comes_too_late_is_not_begun() -> None:
    rig = Rig(B, C, learned=learned(10_000))
    for i, board in enumerate((B, C)):
        ask = Propose(f"request-{i}", 1, WHY, Sampling(), 25_000)
        rig.take(rig.node.receive(board, ask, rig.now))
    rig.now += 20_000  # the first one took twice its time
    rig.done()
    assert len(rig.started) == 1
    ((to, declined),) = rig.messages(Declined)
    assert (to, declined.request_id) == (C, "request-1")


def test_prompts_are_bounded_in_bytes_own_and_peers_apart() -> None:
    rig = Rig(B, C, queue_bytes=2 * limits.MIB, proposal_max_tokens=16)
    long = (ChatMessage("user", "x" * 200 * limits.KIB),)
    for i in range(9):
        ask = Propose(f"request-{i}", 1, long, Sampling(), 900_000)
        rig.take(rig.node.receive((B, C)[i % 2], ask, rig.now))
    assert rig.node.queue.size_bytes(own=False) <= limits.MIB
    assert 3 <= rig.node.peer_jobs() <= 5
    for i in range(5):
        request = Request(f"mine-{i}", long, 10, 0, 0, Sampling(max_tokens=64), 600_000)
        rig.take(rig.node.submit(request, rig.now))
    assert 2 <= len(rig.node.runs) < 5
    assert rig.events(Failed)[0].code == "overloaded"


def test_applications_take_turns_and_peers_are_not_shut_out() -> None:
    rig = Rig(B)
    for i in range(8):
        rig.ask(0, 0, name=f"chatty-{i}", client="chatty")
    rig.ask(0, 0, name="other-0", client="other")
    rig.take(rig.node.receive(B, proposal_for(B), rig.now))
    order: list[str] = []
    while rig.node.queue.running:
        (work,) = rig.node.queue.running.values()
        order.append(work.request_id)
        rig.done()
    assert order.index("other-0") < 4
    assert order.index("request-9") < 6


def test_the_status_says_how_busy_it_is_and_what_there_is_room_for() -> None:
    rig = Rig(B, C, learned=learned(2_000))
    for board, rho in ((B, 200), (C, 900)):
        figures = {"proposal_ms": 1_000, "aggregation_ms": 2_000, "utilisation_permille": rho}
        rig.take(rig.node.receive(board, report(board, **figures), rig.now))
    status = snapshot(rig.node, rig.now)
    assert status.utilisation == 0
    plans = {(each.layers, each.proposers): each for each in status.headroom}
    assert plans.keys() == {(2, 2), (2, 1), (1, 2), (1, 1), (0, 0)}
    assert plans[0, 0].prompts_per_min == pytest.approx(30)  # 1 / 2 s
    assert plans[1, 2].prompts_per_min == pytest.approx(6)  # C has a tenth of a job a second
    assert plans[1, 2].limited_by == (C,)
    assert status.caps["own"].requests == status.own_requests_cap
    assert status.peers[1].utilisation == 0.9
    for i in range(30):
        rig.now += 10_000
        rig.ask(0, 0, name=f"request-{i}")
        rig.done()
    busy = snapshot(rig.node, rig.now)
    assert busy.prompts_per_min == pytest.approx(6, rel=0.2)
    assert 0 < busy.utilisation < 0.3


# --- what a review found


def test_one_slow_aggregation_is_not_the_last_one() -> None:
    rig = Rig(B, learned=learned(1_000), promise_ms=60_000)
    slow = msgspec.structs.replace(learned().jobs[1], model_ms=400_000, tokens=30)
    rig.node.queue.times.recall(Learned("tiny", (learned().jobs[0], slow)))
    plans = []
    for i in range(30):
        rig.take(rig.node.receive(B, report("bb", 10 + i, proposal_ms=1_000), rig.now))
        rig.clear()
        rig.ask(1, 1, name=f"request-{i}")
        plans.append(rig.one(Accepted).granted.layers)
        rig.take(rig.node.cancel(f"request-{i}", rig.now))
    assert plans.count(1) == 3


def test_what_is_expected_follows_from_the_prompt_and_its_limit() -> None:
    rates = Rates((PrefillRate(100, 1.0),), (DecodeRate(1, 100, 50.0),))
    rig = Rig(B, learned=learned())
    expected = []
    for measured in (False, True):
        if measured:
            rig.node.measured(rates)
        for i, (prompt_tokens, max_tokens) in enumerate([(50, 512), (50, 3), (1_050, 512)]):
            request = Request(
                f"{measured}-{i}-long", WHY, prompt_tokens, 0, 0, Sampling(max_tokens=max_tokens),
                600_000,
            )  # fmt: skip
            outlook = rig.node.outlook(rig.now, request)
            expected.append((outlook.proposal_ms, outlook.aggregation_ms))
    usual, short = (1_000, 2_000), (150, 200)
    by_rates = [(1_050, 1_700), (200, 350), (2_050, 2_700)]  # 50 + 20 x 50, 200 + 30 x 50, ...
    # Without rates there is no telling what reading takes.
    assert expected == [pytest.approx(each, rel=0.02) for each in (usual, short, usual, *by_rates)]


def test_one_slow_job_for_a_peer_is_not_the_last_one() -> None:
    rig = Rig(B, learned=learned(119_000))
    ask = Propose("request-9", 1, WHY, Sampling(), 60_000)
    rig.take(rig.node.receive(B, ask, rig.now))
    assert len(rig.started) == 1
    assert not rig.messages(Declined)


def test_an_owner_that_was_never_measured_proposes() -> None:
    rig = Rig(B, C)
    for board in (B, C):
        rig.take(rig.node.receive(board, report(board, proposal_ms=10), rig.now))
    rig.ask(1, 2)
    assert len(rig.started) == 1
    assert rig.node.report(rig.now).proposal_ms == 0  # a guess is not told
    rig.done()
    assert rig.node.report(rig.now).proposal_ms > 0


def test_an_answer_that_another_board_cut_short_is_written_here() -> None:
    rig = Rig(B, learned=learned(9_000), aggregator="strongest", answer_max_tokens=1_000)
    rig.take(rig.node.receive(B, report("bb", proposal_ms=1_000), rig.now))
    rig.ask(1, 1, deadline_ms=600_000, sampling=Sampling(max_tokens=900))
    rig.propose(B, "from B")
    rig.done("own")
    question = rig.messages(Propose)[-1][1]
    assert question.is_answer
    assert question.time_left_ms <= 300_000  # some is left for this board
    cut = Proposal("request-1", 2, "so far", "tiny", 10, 256, 3, 7, "length")
    rig.take(rig.node.receive(B, cut, rig.now))
    assert rig.started[-1].job.kind == "aggregation"
    rig.clear()
    rig.ask(1, 1, name="request-2", sampling=Sampling(max_tokens=1_001))
    rig.done("own", index=0) if rig.started else None
    assert not any(ask.is_answer for _, ask in rig.messages(Propose))


@pytest.mark.parametrize("how", ["auto", "strongest"])
def test_what_did_not_fit_here_is_not_handed_over_in_the_middle(how: str) -> None:
    rig = Rig(B, learned=learned(), aggregator=how)
    slow = {"proposal_ms": 90_000, "aggregation_ms": 90_000}
    rig.take(rig.node.receive(B, report("bb", **slow), rig.now))
    rig.ask(1, 1, deadline_ms=600_000)
    rig.propose(B, "from B")
    rig.done("own")
    rig.take(rig.node.receive(B, report("bb", 10, proposal_ms=1), rig.now))  # fast, all at once
    job_id = rig.started[-1].job.job_id
    rig.take(rig.node.failed(job_id, WorkFailed("too long", "context"), rig.now))
    assert rig.started[-1].job.job_id > job_id
    rig.done("here")
    assert rig.one(Answered).text == "here"
