"""Texts that are told of while they are written: at who writes, and at who waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_node import WHY, B, C, D, Rig, learned, report

from edgemoa.core import limits
from edgemoa.core.events import (
    Answered,
    EngineInfo,
    Failed,
    ProposalArrived,
    ReadAhead,
    Request,
    Text,
    WorkDone,
)
from edgemoa.core.messages import (
    BoardId,
    Cancel,
    ChatMessage,
    Declined,
    Leave,
    Message,
    Part,
    Proposal,
    Propose,
    Sampling,
)
from edgemoa.core.moa import Draft, Room, Synthesis, shown
from edgemoa.core.parts import ANSWER_MS, PROPOSAL_MS, READ_CHARACTERS, STALL_MS, Hearing, Telling

LONG = "Light is scattered by what is small. " * 10
ROOM = Room(4_000)
assert READ_CHARACTERS == 160  # which the texts below are cut by


# --- the two ends


def test_parts_are_told_now_and_then_and_grow_where_there_is_no_room() -> None:
    telling = Telling(100)
    assert telling.write("one", 1_000) == (0, "one")
    assert telling.write(" two", 1_050) is None
    assert telling.write(" three", 1_100) == (3, " two three")
    telling.take_back(3)  # there was no room for it
    assert telling.write(" four", 1_199) is None
    assert telling.write("", 1_200) == (3, " two three four")
    assert telling.write("", 1_400) is None  # nothing new


def test_what_is_written_anew_after_a_loss_goes_on_or_is_told_no_more() -> None:
    telling = Telling(0)
    assert telling.write("one two", 0) == (0, "one two")
    telling.begin_anew()
    assert telling.write("one", 0) is None
    assert telling.write(" two three", 0) == (7, " three")
    telling.begin_anew()
    assert telling.write("another text, and a longer one", 0) is None


def test_a_text_is_told_of_up_to_what_a_proposal_may_be() -> None:
    telling, hearing = Telling(0), Hearing(limits.MAX_PROPOSAL_BYTES)
    told = 0
    for _ in range(2 * limits.MAX_PROPOSAL_BYTES // 1_000):
        part = telling.write("ä" * 500, 0)
        if part is not None:
            assert hearing.hear(*part)
            told += len(part[1])
    assert limits.MAX_PROPOSAL_BYTES - 1_000 < 2 * told <= limits.MAX_PROPOSAL_BYTES
    assert len(telling.written) <= limits.MAX_PROPOSAL_BYTES + 500


def test_only_what_goes_on_from_what_is_there_is_heard() -> None:
    hearing = Hearing(10)
    assert hearing.hear(0, "abc")
    for start, text in ((0, "abc"), (2, "cd"), (4, "e"), (3, ""), (3, "x" * 8), (3, "ä" * 4)):
        assert not hearing.hear(start, text)
    assert hearing.hear(3, "ädefgh")  # seven bytes
    assert (hearing.text, hearing.size_bytes) == ("abcädefgh", 10)


@given(
    st.lists(
        st.sampled_from(["a", " ", "\n", "<think>", "</think>", "<rea", "soning>", "END", "E"]),
        max_size=12,
    ),
    st.lists(st.sampled_from(["END", "a\n", "\n\n", "EN", " a"]), max_size=2, unique=True),
)
def test_what_is_shown_stays_as_it_was_whatever_follows(words: list[str], stop: list[str]) -> None:
    whole = "".join(words)
    draft = Draft.of(B, whole, 5, "stop", own=False)
    answer = draft.as_answer(Sampling(max_tokens=1_000, stop=tuple(stop))).text
    so_far = [shown(whole[:end], stop) for end in range(len(whole) + 1)]
    assert all(answer.startswith(each) for each in so_far)


# --- at the proposer


def ask_of(board: BoardId, *, is_answer: bool = False, stream: bool = True) -> Propose:
    layer = 2 if is_answer else 1
    return Propose(f"request-{board}", layer, WHY, Sampling(), 9_000, is_answer, stream)


def wrote(rig: Rig, text: str, later_ms: int = 0, index: int = -1) -> None:
    rig.now += later_ms
    rig.take(rig.node.wrote(rig.started[index].job.job_id, text, rig.now))


def parts(rig: Rig) -> list[tuple[int, str]]:
    return [(part.start, part.text) for _, part in rig.messages(Part)]


@pytest.mark.parametrize(("is_answer", "every_ms"), [(False, PROPOSAL_MS), (True, ANSWER_MS)])
def test_who_is_asked_to_tells_while_it_writes(is_answer: bool, every_ms: int) -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, ask_of(B, is_answer=is_answer), rig.now))
    assert rig.started[-1].job.stream
    wrote(rig, "one")
    wrote(rig, " two", every_ms - 1)
    wrote(rig, " three", 1)
    assert parts(rig) == [(0, "one"), (3, " two three")]
    ((to, part),) = rig.messages(Part)[1:]
    assert (to, part.request_id, part.layer) == (B, "request-bb", 1 + is_answer)
    rig.take(rig.node.undelivered(B, part, rig.now))
    wrote(rig, " four", every_ms)
    assert parts(rig)[2:] == [(3, " two three four")]
    rig.done("one two three four five")  # all of it, signed, whatever was told
    assert rig.messages(Proposal)[0][1].text == "one two three four five"
    assert not rig.told
    rig.take(rig.node.undelivered(B, part, rig.now))  # too late to matter


def test_who_is_not_asked_to_tells_nothing() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, ask_of(B, stream=False), rig.now))
    assert not rig.started[-1].job.stream
    wrote(rig, "one", 1_000)
    assert not parts(rig)


def test_a_proposer_whose_model_process_died_goes_on_where_it_was() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, ask_of(B), rig.now))
    wrote(rig, "one two")
    rig.take(rig.node.engine_is_lost(rig.now))
    rig.take(rig.node.engine_is_ready(EngineInfo("tiny", 2048, 1), rig.now))
    for text in ("one", " two", " three"):
        wrote(rig, text, PROPOSAL_MS)
    assert parts(rig) == [(0, "one two"), (7, " three")]


def test_called_off_nothing_more_is_told() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, ask_of(B), rig.now))
    rig.take(rig.node.receive(B, Cancel("request-bb", 1), rig.now))
    wrote(rig, "one", 1_000)
    assert not parts(rig)


# --- at the owner: what is read ahead


def reading(rig: Rig, slots: int = 2) -> Rig:
    """With a model that reads ahead."""
    info = EngineInfo("tiny", 4096, slots, reads_ahead=True)
    rig.take(rig.node.engine_is_ready(info, rig.now))
    return rig


def tells(rig: Rig, peer: BoardId, text: str, start: int = 0, layer: int = 1) -> None:
    rig.take(rig.node.receive(peer, Part("request-1", layer, start, text), rig.now))


def ahead(begun: str, *drafts: str) -> ReadAhead:
    there = [Draft(B, text, 5, own=False) for text in drafts]
    return ReadAhead("request-1", Synthesis().begin(WHY, there, ROOM, begun))


def test_what_is_begun_follows_what_is_there_and_nothing_behind_it() -> None:
    one, two = (Draft(B, text, 5, own=False) for text in ("one", "two"))
    synthesis = Synthesis()
    finished = synthesis.begin(WHY, [one, two], ROOM)
    begun = synthesis.begin(WHY, [one], ROOM, "tw")
    assert finished[-1].content.startswith(begun[-1].content)
    assert begun[-1].content.endswith("tw")
    assert synthesis.begin(WHY, [], ROOM, "tw") == (*WHY, ChatMessage("assistant", "tw"))
    # What it will be cut to is not known yet, nor what will be thought of.
    assert synthesis.begin(WHY, [one], ROOM, "<think> two") == synthesis.begin(WHY, [one], ROOM)
    assert synthesis.begin(WHY, [one], Room(70), LONG) == synthesis.begin(WHY, [one], Room(70))
    assert synthesis.begin(WHY, [], Room(10), LONG) == ()


def test_a_model_that_rests_reads_the_next_proposal_as_it_is_written() -> None:
    rig = reading(Rig(B))
    rig.ask(1, 1)
    assert rig.messages(Propose)[0][1].stream
    tells(rig, B, LONG[:200])
    assert not rig.ahead  # it writes the own proposal
    rig.done("own")
    assert rig.ahead == [ahead(LONG[:200], "own")]
    tells(rig, B, LONG[200:210], 200)  # too little to be worth it
    tells(rig, B, LONG[210:370], 210)
    assert rig.ahead[1:] == [ahead(LONG[:370], "own")]
    tells(rig, B, "of another place", 300)
    rig.propose(B, LONG)
    assert rig.ahead[2:] == [ReadAhead("request-1")]
    content = rig.started[-1].job.messages[1].content
    assert content.startswith(rig.ahead[1].messages[1].content)


def test_one_is_read_at_a_time_and_dropped_where_another_comes_first() -> None:
    rig = reading(Rig(B, C, D))
    rig.ask(1, 3)
    rig.done("own")
    rig.clear()
    tells(rig, B, LONG[:200])
    tells(rig, C, LONG[:300])
    tells(rig, C, LONG[:300], 300)
    assert rig.ahead == [ahead(LONG[:200], "own")]
    rig.propose(D, "from D")
    assert rig.ahead[1:] == [ahead(LONG[:200], "own", "from D")]
    rig.take(rig.node.receive(B, Declined("request-1", 1, "no"), rig.now))
    tells(rig, C, LONG[:160], 600)
    assert rig.ahead[2:] == [ahead(LONG[:300] * 2 + LONG[:160], "own", "from D")]


def test_where_the_model_has_other_work_only_what_is_finished_is_read() -> None:
    rig = reading(Rig(B, C, D))
    rig.ask(1, 3)
    rig.done("own")
    rig.take(rig.node.receive(D, ask_of(D, stream=False), rig.now))
    rig.clear()
    tells(rig, B, LONG)
    assert not rig.ahead
    rig.propose(C, "from C")
    assert rig.ahead == [ahead("", "own", "from C")]


def test_parts_are_asked_for_where_they_may_be_of_use() -> None:
    rig = reading(Rig(B))
    rig.ask(1, 1, name="request-1")
    rig.ask(1, 1, name="request-2")  # the model will not rest
    rig.take(rig.node.engine_is_ready(EngineInfo("tiny", 2048, 1), rig.now))
    rig.take(rig.node.cancel("request-1", rig.now))
    rig.take(rig.node.cancel("request-2", rig.now))
    rig.ask(1, 1, name="request-3")  # it does not read ahead
    assert [ask.stream for _, ask in rig.messages(Propose)] == [True, False, False]


@pytest.mark.parametrize(
    "part",
    [
        Part("request-2", 1, 0, LONG),  # unknown
        Part("request-1", 2, 0, LONG),  # not yet
        Part("request-1", 1, 1, LONG),  # with a gap before it
    ],
)
def test_parts_that_do_not_belong_are_ignored(part: Part) -> None:
    rig = reading(Rig(B, C))
    rig.ask(1, 1, sampling=Sampling(max_tokens=100))
    (asked,) = (to for to, _ in rig.messages(Propose))
    other = C if asked == B else B
    rig.done("own")
    rig.clear()
    rig.take(rig.node.receive(asked, part, rig.now))
    tells(rig, other, LONG)  # was not asked
    tells(rig, asked, "x" * (limits.MAX_PROPOSAL_BYTES))  # more than its tokens can be
    assert not (rig.ahead or rig.told or rig.sent)
    rig.propose(asked, "there")
    rig.clear()
    tells(rig, asked, LONG)  # finished
    rig.take(rig.node.cancel("request-1", rig.now))
    rig.clear()
    tells(rig, asked, LONG)
    assert not (rig.ahead or rig.told or rig.sent)


# --- at the owner: an answer that another board writes


def handed_over(**settings: object) -> Rig:
    """The answer to a client that is shown it as it comes is to be written by B."""
    rig = Rig(B, learned=learned(9_000), aggregator="strongest", layer_deadline_ms=20_000,
              **settings)  # fmt: skip
    rig.take(rig.node.receive(B, report("bb", proposal_ms=1_000), rig.now))
    sampling = Sampling(max_tokens=64, stop=("END",))
    request = Request("request-1", WHY, 10, 1, 1, sampling, 600_000, streamed=True)
    rig.take(rig.node.submit(request, rig.now))
    rig.propose(B, "from B")
    rig.done("own")
    (ask,) = (ask for _, ask in rig.messages(Propose) if ask.is_answer)
    assert ask.stream
    assert ask.time_left_ms > 500_000
    rig.clear()
    return rig


def shows(rig: Rig) -> str:
    return "".join(event.text for event in rig.events(Text))


def test_an_answer_from_afar_is_shown_as_it_comes() -> None:
    rig = handed_over()
    tells(rig, B, "Light is ", layer=2)
    assert shows(rig) == "Light is"
    tells(rig, B, "scattered E", 9, layer=2)  # that may become the stop string
    tells(rig, B, "ND and more", 20, layer=2)
    assert shows(rig) == "Light is scattered"
    tells(rig, B, "of something else", 3, layer=2)
    rig.propose(B, "Light is scattered END and more", layer=2)
    answered = rig.one(Answered)
    assert answered.text == shows(rig) == "Light is scattered "
    assert answered.note == ""
    assert rig.node.idle


def test_a_client_that_waits_for_all_of_it_keeps_its_second_chance() -> None:
    rig = Rig(B, learned=learned(9_000), aggregator="strongest")
    rig.take(rig.node.receive(B, report("bb", proposal_ms=1_000), rig.now))
    rig.ask(1, 1, deadline_ms=600_000)
    rig.propose(B, "from B")
    rig.done("own")
    assert [ask.stream for _, ask in rig.messages(Propose)] == [False, False]
    tells(rig, B, "Light", layer=2)
    assert not rig.events(Text)
    rig.take(rig.node.receive(B, Leave(1), rig.now))
    assert rig.started[-1].job.kind == "aggregation"


def gone(rig: Rig) -> None:
    rig.take(rig.node.receive(B, Leave(1), rig.now))


def declined(rig: Rig) -> None:
    rig.take(rig.node.receive(B, Declined("request-1", 2, "no memory"), rig.now))


def restarted(rig: Rig) -> None:
    rig.hear(B, sequence=1, boot=2)


def stalls(rig: Rig) -> None:
    for _ in range(STALL_MS // 1_000 + 1):
        rig.tick(1_000, B)


def other(rig: Rig) -> None:
    rig.propose(B, "Rain is wet.", layer=2)


def empty(rig: Rig) -> None:
    rig.propose(B, "", layer=2)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (gone, "left the group"),
        (declined, "no memory"),
        (restarted, "restarted"),
        (stalls, "too late"),
        (other, "otherwise than it began"),
        (empty, "wrote nothing"),
    ],
)
def test_what_has_been_shown_is_never_mixed_with_another_text(
    how: Callable[[Rig], None], why: str
) -> None:
    rig = handed_over()
    tells(rig, B, "Light is", layer=2)
    how(rig)
    failed = rig.one(Failed)
    assert "bb" in failed.reason
    assert why in failed.reason
    assert not rig.started
    assert not rig.events(Answered)
    assert shows(rig) == "Light is"
    assert rig.node.idle
    tells(rig, B, " scattered", 8, layer=2)
    rig.propose(B, "Light is scattered", layer=2)
    assert len(rig.told) == len(rig.events(Text)) + 2  # who was left out or came, and the end
    assert {type(event) for event in rig.told} - {Text, Failed} <= {
        ProposalArrived, type(rig.told[-2])
    }  # fmt: skip


@pytest.mark.parametrize("how", [gone, declined, restarted, stalls, empty])
def test_where_nothing_was_shown_yet_the_owner_writes(how: Callable[[Rig], None]) -> None:
    rig = handed_over()
    tells(rig, B, " <think>Li", layer=2)
    how(rig)
    assert rig.started[-1].job.kind == "aggregation"
    rig.done("here")
    assert rig.one(Answered).text == shows(rig) == "here"


def test_a_board_that_goes_on_writing_is_not_late() -> None:
    rig = handed_over()
    for n in range(40):
        tells(rig, B, "word ", 5 * n, layer=2)
        rig.tick(1_000, B)
    rig.propose(B, "word " * 41, layer=2)
    assert rig.one(Answered).text == "word " * 40 + "word"


def test_at_the_deadline_what_was_shown_is_the_answer() -> None:
    rig = handed_over()
    for n in range(60):
        tells(rig, B, "word ", 5 * n, layer=2)
        rig.tick(10_000, B)
    answered = rig.one(Answered)
    assert answered.finish == "deadline"
    assert answered.text == shows(rig) == ("word " * 60).strip()
    assert answered.tokens == 75
    assert rig.messages(Cancel) == [(B, Cancel("request-1", 2))]


def test_what_another_board_cut_short_ends_there_once_it_was_shown() -> None:
    rig = handed_over()
    tells(rig, B, "Light is", layer=2)
    cut = Proposal("request-1", 2, "Light is scat", "tiny", 10, 5, 3, 7, "length")
    rig.take(rig.node.receive(B, cut, rig.now))
    answered = rig.one(Answered)
    assert (answered.text, answered.finish) == ("Light is scat", "length")
    assert "bb" in answered.note


def test_a_question_that_is_being_answered_was_delivered() -> None:
    rig = handed_over()
    tells(rig, B, "Light is", layer=2)
    ask: Message = Propose("request-1", 2, WHY, Sampling(), 9_000, True, True)
    rig.take(rig.node.undelivered(B, ask, rig.now))
    rig.propose(B, "Light is scattered", layer=2)
    assert rig.one(Answered).text == "Light is scattered"


def test_an_owner_that_loses_its_model_process_loses_nothing_of_it() -> None:
    rig = handed_over()
    tells(rig, B, "Light is", layer=2)
    rig.take(rig.node.engine_is_lost(rig.now))
    tells(rig, B, " scattered", 8, layer=2)
    rig.propose(B, "Light is scattered.", layer=2)
    assert rig.one(Answered).text == shows(rig) == "Light is scattered."


def test_memory_for_parts_is_counted() -> None:
    rig = Rig(B)
    rig.take(rig.node.receive(B, ask_of(B, stream=False), rig.now))
    plain = rig.node.queue.size_bytes(own=False)
    rig.done()
    rig.take(rig.node.receive(B, Propose("request-9", 1, WHY, Sampling(), 9_000, stream=True),
                              rig.now))  # fmt: skip
    assert rig.node.queue.size_bytes(own=False) >= 2 * plain
    done = WorkDone("x", "stop", 1, 1, 1, 1)
    rig.take(rig.node.finished(rig.started[-1].job.job_id, done, rig.now))
    assert rig.node.queue.size_bytes(own=False) == 0
