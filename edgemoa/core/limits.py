"""Every bound in one place, with the relations between them asserted below.

What crosses a trust border (network, local socket, files) is checked against these before
anything is allocated for it.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# The wire
MAX_DATAGRAM_BYTES: Final = 1200  # sealed; under every usual MTU, so that no IP fragment is made
MAX_FRAME_BYTES: Final = 1 * MIB  # one envelope over TLS
MAX_PROMPT_BYTES: Final = 256 * KIB  # all messages of one conversation, UTF-8
MAX_PROPOSAL_BYTES: Final = 64 * KIB
MAX_MESSAGES: Final = 512  # turns in what a model is given
MAX_TURNS: Final = MAX_MESSAGES - 2  # of a user's conversation; an aggregation adds two
MAX_NAME_BYTES: Final = 64
MAX_REASON_BYTES: Final = 256
MAX_NEWS: Final = 20  # of boards in one datagram: 40 bytes each at most

# The network shell
MAX_OUTBOX_MESSAGES: Final = 256  # to one board, waiting or not yet acknowledged
MAX_OUTBOX_BYTES: Final = 4 * MIB  # the same, in bytes
MAX_ALL_OUTBOXES_BYTES: Final = 32 * MIB  # to all boards together
MAX_IN_FLIGHT: Final = 128  # envelopes sent to one board and not yet acknowledged
MAX_LINK_QUEUE_BYTES: Final = 2 * MIB  # frames that wait for one link's socket
MAX_PARTS_QUEUE_BYTES: Final = 64 * KIB  # beyond these, no parts of texts join them
REPLAY_WINDOW: Final = 1024  # datagram counters and envelope sequences remembered behind the newest
MAX_HALF_OPEN: Final = 64  # connections that have not said who they are
MAX_PAIRINGS: Final = 32  # pairing runs at a time that strangers started here
MAX_SUITS: Final = 64  # boards that this one tries to pair with at a time
MAX_PAIRING_FRAME_BYTES: Final = 4 * KIB
MAX_CERTIFICATE_BYTES: Final = 1 * KIB
MAX_DISCOVERED: Final = 256  # boards heard of and not paired
MAX_ADDRESSES: Final = 8  # of one board

# A group and its plans
MAX_GROUP_BOARDS: Final = 64
MAX_GONE_BOARDS: Final = 256  # revoked, or under a key that was replaced: remembered
MAX_RECORD_BYTES: Final = 2 * KIB  # of a roster
MAX_LAYERS: Final = 8
MAX_PROPOSERS: Final = 16

# Work
MAX_COMPLETION_TOKENS: Final = 32_768
MAX_OWN_REQUESTS: Final = 1024  # what the configuration may ask for at most
MAX_PEER_JOBS: Final = 1024
MAX_REMEMBERED_RESULTS: Final = 32  # answers to one board, kept to answer a repeated question
MAX_PEER_JOB_MS: Final = 3_600_000  # a peer's job is dropped then, whatever its owner says
MAX_CANDIDATES: Final = 32  # texts that are scored behind one prompt
MAX_EMBEDDED: Final = 64  # texts that are embedded at a time; MAX_PROMPT_BYTES together
MAX_DIMENSIONS: Final = 8192  # of a text's vector
MAX_JOB_ATTEMPTS: Final = 2  # a request that the model process died on is tried once more

# An answer's form
MAX_SCHEMA_BYTES: Final = 64 * KIB  # a JSON schema, as JSON
MAX_BIASES: Final = 1024  # tokens of one request
MAX_TOP_LOGPROBS: Final = 20  # per token; OpenAI's bound
MAX_TOOLS: Final = 128  # that one answer may call; OpenAI's bound
MAX_LOGPROBS: Final = 131_072  # of one answer, alternatives included: about 15 MB in the daemon

# The local API
MAX_BODY_BYTES: Final = 1 * MIB
MAX_API_CONNECTIONS: Final = 512
MAX_MEASURING: Final = 8  # prompts whose tokens are being counted before they are accepted
MAX_CHECKING: Final = 4  # of these, with a JSON schema that is checked first

# The local socket to the model process
MAX_WORKER_FRAME_BYTES: Final = 4 * MIB

# An aggregation carries the conversation and every proposal of the layer before it; what would
# not fit in a frame is trimmed before it is sent, so one board's share has to fit by itself.
assert MAX_PROMPT_BYTES + MAX_PROPOSAL_BYTES < MAX_FRAME_BYTES
assert MAX_DATAGRAM_BYTES < MAX_FRAME_BYTES <= MAX_WORKER_FRAME_BYTES
assert MAX_EMBEDDED * 4 * MAX_DIMENSIONS < MAX_WORKER_FRAME_BYTES
assert MAX_PROMPT_BYTES < MAX_BODY_BYTES
assert MAX_PROPOSERS < MAX_GROUP_BOARDS
assert MAX_CHECKING < MAX_MEASURING  # schemas, which take longer, do not keep prompts out
# Sequences in flight must all fit in the receiver's window, or a late one looks like a repetition.
assert MAX_IN_FLIGHT < REPLAY_WINDOW
assert MAX_FRAME_BYTES < MAX_LINK_QUEUE_BYTES < MAX_OUTBOX_BYTES < MAX_ALL_OUTBOXES_BYTES
assert MAX_CERTIFICATE_BYTES < MAX_PAIRING_FRAME_BYTES
# A whole roster is told in one frame.
assert (MAX_GROUP_BOARDS + MAX_GONE_BOARDS) * MAX_RECORD_BYTES < MAX_FRAME_BYTES
