"""One prompt's life at its owner: layers of proposals, then one answer.

Algorithm 1 of Mitra, Kaswan, Ulukus (arXiv 2412.21200): in each of M layers the owner's prompt
goes to the owner's own model and to k peers; their answers, concatenated, feed the next layer;
the owner's model aggregates the last. How answers become the next prompt, and the last ones the
answer, is a :class:`Strategy`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, NamedTuple, Protocol, TypeAlias

from edgemoa.core import limits
from edgemoa.core.events import (
    Finish,
    Granted,
    LeftOut,
    ProposalRecord,
    Request,
    TokenLogprob,
    Wishes,
)
from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.core.parts import BYTES_PER_TOKEN, Hearing

REQUEST: Final = "{request}"
AGGREGATION_PROMPT: Final = f"Using the best of these answers, answer once more: {REQUEST}"
"""What the user's side says after the proposals. Small models follow the last thing that they read,
so it is short, and the request stands at the end once more."""
BETWEEN_PROPOSALS: Final = "\n\n---\n\n"
REPEATED_CHARACTERS: Final = 1_000  # a longer request is referred to, not repeated
FRAME_TOKENS: Final = 24  # what is put around one proposal
SHORTEST_SHARE_TOKENS: Final = 16  # a proposal cut below this says nothing any more
SHORTEST_SHARE_BYTES: Final = 64
MOST_BYTES_PER_TOKEN: Final = 16  # in running text; who claims more has miscounted


@dataclass(frozen=True, slots=True)
class Draft:
    """A proposal's text, as a strategy sees it. ``tokens`` is its author's word, made plausible."""

    board: BoardId
    text: str
    tokens: int
    own: bool
    finish: Finish = "stop"

    @classmethod
    def of(cls, board: BoardId, text: str, tokens: int, finish: Finish, *, own: bool) -> Draft:
        """What ``board`` wrote, without its reasoning."""
        text = without_reasoning(text)
        least = len(text.encode()) // MOST_BYTES_PER_TOKEN
        return cls(board, text, max(tokens, least, 1), own, finish)

    def as_answer(self, sampling: Sampling) -> Draft:
        """The draft within the bounds that the user set for the answer."""
        text, finish = self.text, self.finish
        for stop in sampling.stop:
            if stop in text:
                text, finish = text[: text.index(stop)], "stop"
        if self.tokens > sampling.max_tokens:
            text, finish = text[: len(self.text) * sampling.max_tokens // self.tokens], "length"
        tokens = min(self.tokens, sampling.max_tokens)
        return Draft(self.board, text, tokens, self.own, finish)

    def is_what_was_asked(self, sampling: Sampling, wishes: Wishes) -> bool:
        """Whether the model, asked for the answer itself, would have written this very text.

        That is so for the owner's draft, which is greedy, where the user asked for greedy, too,
        without penalties or further wishes, and neither stop strings nor the length would have cut
        it elsewhere.
        """
        ended = self.finish in ("stop", "loop") and self.tokens <= sampling.max_tokens
        return (
            self.own
            and not wishes
            and sampling.temperature == 0
            and sampling.repetition_penalty == 1
            and sampling.presence_penalty == sampling.frequency_penalty == 0
            and (ended or self.tokens == sampling.max_tokens)
            and not any(stop in self.text for stop in sampling.stop)
        )


@dataclass(frozen=True, slots=True)
class Write:
    """The owner's model is to write the answer from these messages."""

    messages: tuple[ChatMessage, ...]
    drafts: int  # how many proposals they hold


@dataclass(frozen=True, slots=True)
class Give:
    """This proposal is the answer as it stands."""

    draft: Draft
    note: str


Conclusion: TypeAlias = Write | Give


@dataclass(frozen=True, slots=True)
class Room:
    """What a prompt made of proposals may take up: tokens of context, bytes on the wire."""

    tokens: int
    bytes: int = limits.MAX_PROMPT_BYTES

    def half(self) -> Room:
        """For another try after the model said that it was too much after all."""
        return Room(self.tokens // 2, self.bytes // 2)


class Strategy(Protocol):
    """How proposals become prompts and, at the end, an answer. Pure; the same on every board."""

    def propose(
        self, conversation: Sequence[ChatMessage], previous: Sequence[Draft], room: Room
    ) -> tuple[ChatMessage, ...]:
        """The messages that each proposer of the next layer is given."""

    def begin(
        self,
        conversation: Sequence[ChatMessage],
        drafts: Sequence[Draft],
        room: Room,
        begun: str = "",
    ) -> tuple[ChatMessage, ...]:
        """What the board's own model will be given next, in another layer or to conclude, as far
        as these first proposals of a layer tell, and ``begun``, what is there of the next one; the
        last message goes on. Empty if they do not."""

    def conclude(
        self, conversation: Sequence[ChatMessage], drafts: Sequence[Draft], room: Room
    ) -> Conclusion:
        """How the proposals of the last layer (possibly none) become the answer."""

    def fall_back(self, drafts: Sequence[Draft]) -> Draft | None:
        """The proposal to give where the conclusion could not be had."""


class Synthesis:
    """The paper's way: the owner's model writes one answer out of all proposals.

    They follow the conversation as a turn of the assistant's, and the instruction as a turn of the
    user's. So a model that has already read the conversation can go on from there instead of
    reading it again, and each proposal can be read as it arrives. They are not numbered: with the
    default model, the same words after numbered proposals gave an answer that spoke of them, or of
    its own corrections, for 13 of 14 prompts, and for 1 of 14 like this.
    """

    def __init__(self, instruction: str = AGGREGATION_PROMPT) -> None:
        """
        :param instruction: the last turn; ``{request}`` in it stands for the user's own words.
        """
        self._instruction = instruction

    def propose(
        self, conversation: Sequence[ChatMessage], previous: Sequence[Draft], room: Room
    ) -> tuple[ChatMessage, ...]:
        """The conversation itself in the first layer, with the previous answers after that."""
        return self._with_drafts(conversation, previous, room).messages

    def begin(
        self,
        conversation: Sequence[ChatMessage],
        drafts: Sequence[Draft],
        room: Room,
        begun: str = "",
    ) -> tuple[ChatMessage, ...]:
        """The conversation and the proposals so far, unless more of them leave less room for
        each; the instruction comes after the last one."""
        begun = without_reasoning(begun)
        if begun:
            tokens = len(begun.encode()) // BYTES_PER_TOKEN
            whole = [*drafts, Draft(BoardId(""), begun, tokens, own=False)]
            messages = self._compose(conversation, whole)
            if fit(whole, room) == whole and size_bytes(messages) <= limits.MAX_PROMPT_BYTES:
                return messages[:-1]
        written = self._with_drafts(conversation, drafts, room)
        if not written.drafts:
            return ()
        *before, proposals, _ = written.messages
        return (*before, ChatMessage(proposals.role, proposals.content + BETWEEN_PROPOSALS))

    def conclude(
        self, conversation: Sequence[ChatMessage], drafts: Sequence[Draft], room: Room
    ) -> Conclusion:
        """Write from all proposals; a single one, the owner's own, is already the answer."""
        if len(drafts) == 1 and drafts[0].own:
            return Give(drafts[0], "no peer's proposal arrived: the board's own answer")
        return self._with_drafts(conversation, drafts, room)

    def fall_back(self, drafts: Sequence[Draft]) -> Draft | None:
        """The owner's own (it is the greedy one), else the first that arrived."""
        return next((draft for draft in drafts if draft.own), drafts[0] if drafts else None)

    def _with_drafts(
        self, conversation: Sequence[ChatMessage], drafts: Sequence[Draft], room: Room
    ) -> Write:
        """The conversation with as much of the drafts as there is room for.

        What stands around them counts, too: the whole is measured, and made again of less.
        """
        while fitting := fit(drafts, room):
            messages = self._compose(conversation, fitting)
            if size_bytes(messages) <= limits.MAX_PROMPT_BYTES:
                return Write(messages, len(fitting))
            room = room.half()
        return Write(tuple(conversation), 0)

    def _compose(
        self, conversation: Sequence[ChatMessage], drafts: Sequence[Draft]
    ) -> tuple[ChatMessage, ...]:
        proposals = BETWEEN_PROPOSALS.join(draft.text for draft in drafts)
        request = conversation[-1].content
        if len(request) > REPEATED_CHARACTERS:
            request = "my request above"
        asked = self._instruction.replace(REQUEST, request)
        return (*conversation, ChatMessage("assistant", proposals), ChatMessage("user", asked))


def size_bytes(messages: Sequence[ChatMessage]) -> int:
    """What a conversation's texts take up, in UTF-8."""
    return sum(len(message.content.encode()) for message in messages)


def held_bytes(messages: Sequence[ChatMessage]) -> int:
    """What a conversation's texts take up in memory: one rare character widens all of its text."""
    return sum(sys.getsizeof(message.content) for message in messages)


def fit(drafts: Sequence[Draft], room: Room) -> list[Draft]:
    """Shorten the longest drafts until all fit; drop the last ones if they still would not.

    Token counts are the proposers' own, which may use another tokenizer: an estimate, to be
    corrected by asking again with half the room.
    """
    kept = list(drafts)
    while kept:
        tokens = _shares(
            [draft.tokens for draft in kept], room.tokens - FRAME_TOKENS * (len(kept) + 1)
        )
        sizes = _shares([len(draft.text.encode()) for draft in kept], room.bytes)
        if all(
            share >= min(SHORTEST_SHARE_TOKENS, draft.tokens)
            and size >= min(SHORTEST_SHARE_BYTES, len(draft.text.encode()))
            for draft, share, size in zip(kept, tokens, sizes, strict=True)
        ):
            return [
                _shorten(draft, share, size)
                for draft, share, size in zip(kept, tokens, sizes, strict=True)
            ]
        kept.pop()
    return kept


def _shares(wanted: Sequence[int], room: int) -> list[int]:
    """Give each what it wants, the largest cut to one common level where room is short."""
    shares = list(wanted)
    left, open_ = max(room, 0), sorted(range(len(wanted)), key=lambda i: wanted[i])
    for n, i in enumerate(open_):
        shares[i] = min(wanted[i], left // (len(open_) - n))
        left -= shares[i]
    return shares


def _shorten(draft: Draft, tokens: int, size_bytes: int) -> Draft:
    if tokens >= draft.tokens and size_bytes >= len(draft.text.encode()):
        return draft
    characters = len(draft.text) * min(tokens, draft.tokens) // max(draft.tokens, 1)
    text = draft.text[:characters].encode()[:size_bytes].decode(errors="ignore")
    cut = max(text.rfind(" "), text.rfind("\n"))
    text = text[:cut] if cut > len(text) // 2 else text
    return replace(draft, text=f"{text} […]", tokens=min(tokens, draft.tokens))


_REASONING = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.DOTALL)
_REASONING_TAGS: Final = ("<think>", "<thinking>", "<reasoning>")


def without_reasoning(text: str) -> str:
    """The text without a reasoning model's thoughts, which are not for the others to read."""
    return _REASONING.sub("", text).strip()


def shown(text: str, stop: Sequence[str]) -> str:
    """What an answer surely begins with, of which ``text`` is there, whatever follows.

    That is what :meth:`Draft.of` and :meth:`Draft.as_answer` will make of the whole: without
    reasoning, up to the first stop string; less what may turn out to be the beginning of either, or
    the white space at its end.
    """
    text = _without_beginning(without_reasoning(text), _REASONING_TAGS)
    for each in stop:
        if each in text:
            text = text[: text.index(each)]
    return _without_beginning(text, stop).rstrip()


def _without_beginning(text: str, words: Sequence[str]) -> str:
    """``text`` without an end that one of ``words`` begins with, the longest there is."""
    longest = max(map(len, words), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in words):
            return text[:-length]
    return text


class State(StrEnum):
    """Where a prompt is in its life."""

    ACCEPTED = "accepted"
    PROPOSING = "proposing"
    CONCLUDING = "concluding"
    ANSWERED = "answered"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.ACCEPTED: frozenset({State.PROPOSING, State.CONCLUDING, State.FAILED, State.CANCELLED}),
    State.PROPOSING: frozenset(
        {State.PROPOSING, State.CONCLUDING, State.ANSWERED, State.FAILED, State.CANCELLED}
    ),
    State.CONCLUDING: frozenset({State.ANSWERED, State.FAILED, State.CANCELLED}),
    State.ANSWERED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class IllegalTransitionError(RuntimeError):
    """A defect of ours: something tried to move a prompt to a state that cannot follow."""


class Question(NamedTuple):
    """What a peer was asked, and when."""

    asked_ms: int
    size_bytes: int


@dataclass(slots=True)
class Run:
    """A prompt that this board owns, from acceptance to its one end."""

    request: Request
    granted: Granted
    accepted_ms: int
    deadline_ms: int
    promised_ms: int  # when the answer is to be there; the deadline at the latest
    predicted_ms: float = 0.0  # that it takes, by mean times
    own_proposes: bool = True
    handed_over: bool = False  # a peer was asked to write the answer
    footprint_bytes: int = 0  # that it may come to, proposals and all
    state: State = State.ACCEPTED
    layer: int = 0
    layer_deadline_ms: int = 0
    pending: set[BoardId] = field(default_factory=set)  # asked in this layer, not settled
    asked: set[BoardId] = field(default_factory=set)  # in this layer, settled or not
    previous: list[Draft] = field(default_factory=list)  # of the layer before
    drafts: list[Draft] = field(default_factory=list)  # of this layer
    records: list[ProposalRecord] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    questions: dict[BoardId, Question] = field(default_factory=dict)  # of this layer
    notes: list[str] = field(default_factory=list)
    room: Room = Room(0)
    told: str = ""  # what the client has been given of the answer
    attempt: str = ""  # what the running attempt has written of it
    pieces: int = 0  # in so many parts, about one a token
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of its tokens, if asked for
    told_logprobs: int = 0  # how many of them the client has been given
    read_ahead: bool = False  # the model was told what the next prompt begins with
    heard: dict[BoardId, Hearing] = field(default_factory=dict)  # of who is awaited and tells
    reading: BoardId | None = None  # whose unfinished proposal is read ahead

    def move(self, state: State) -> None:
        """Go to ``state``.

        :raises IllegalTransitionError: and changes nothing, where that cannot follow.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"{self.state} -> {state}")
        self.state = state

    def begin_layer(self, boards: Sequence[BoardId], now_ms: int, layer_deadline_ms: int) -> None:
        """Open the next layer with these proposers.

        What time is left of the promise is shared with the layers to come and the aggregation, so
        that a slow layer cannot eat the time in which the answer is to be written.
        """
        self.move(State.PROPOSING)
        parts = max(self.granted.layers - self.layer + 1, 2)  # it is followed by something
        self.layer += 1
        end_ms = self.promised_ms if self.promised_ms > now_ms else self.deadline_ms
        self.layer_deadline_ms = now_ms + min(layer_deadline_ms, (end_ms - now_ms) // parts)
        self.previous, self.drafts = self.drafts or self.previous, []
        self.pending, self.asked = set(boards), set(boards)
        self.heard.clear()
        self.questions.clear()
        self.reading = None

    def ask_also(self, board: BoardId) -> None:
        """A substitute for a proposer that declined."""
        self.pending.add(board)
        self.asked.add(board)

    def take(self, draft: Draft, record: ProposalRecord) -> bool:
        """Take a proposal; False if nobody waits for it (late, repeated, of another layer)."""
        if not self.waits_for(draft.board, record.layer):
            return False
        self._no_longer_wait(draft.board)
        self.drafts.append(draft)
        self.records.append(record)
        return True

    def leave_out(self, board: BoardId, name: str, reason: str) -> LeftOut:
        """Stop waiting for a proposer of this layer."""
        self._no_longer_wait(board)
        out = LeftOut(board=name, board_id=board, layer=self.layer, reason=reason)
        self.left_out.append(out)
        return out

    def _no_longer_wait(self, board: BoardId) -> None:
        self.pending.discard(board)
        self.heard.pop(board, None)
        if self.reading == board:
            self.reading = None

    def heard_of(self, board: BoardId, layer: int) -> Hearing | None:
        """What was heard of a text that is awaited and was to be told of; else None."""
        return self.heard.get(board) if self.waits_for(board, layer) else None

    def unfinished(self) -> Hearing | None:
        """The proposal to read while it is written: one and the same until it is there, the one
        of which there was most."""
        if self.reading is None:
            longest = max(self.heard, key=lambda board: len(self.heard[board].text), default=None)
            self.reading = longest if longest and self.heard[longest].text else None
        return self.heard[self.reading] if self.reading else None

    def waits_for(self, board: BoardId, layer: int) -> bool:
        """Whether a proposal of ``board`` for ``layer`` would still count."""
        return self.state is State.PROPOSING and layer == self.layer and board in self.pending

    def settled(self, quorum: int) -> bool:
        """Whether the layer can be closed: nobody is awaited, or enough are there."""
        return not self.pending or (0 < quorum <= len(self.drafts))

    def best_at_hand(self) -> list[Draft]:
        """The proposals of this layer or, if it has none, of the one before."""
        return self.drafts or self.previous
