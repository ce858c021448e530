"""The engine with a real model process around a tiny model: jobs, failures, life and death."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path

import pytest

from edgemoa.core import limits
from edgemoa.core.events import WorkDone
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.engine import engine as engine_module
from edgemoa.engine import frames
from edgemoa.engine.engine import Engine
from edgemoa.errors import EngineError, InvalidPromptError

from .harness import Recorder, alive, conversation, gone, job, pid_of, process_file, running
from .tiny import CONTEXT_TOKENS, HELLO

LONG = 30_000  # tokens: a few seconds of the tiny model


def test_a_job_is_answered(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            assert events.ready[0].context_tokens == CONTEXT_TOKENS
            assert (events.ready[0].model, events.ready[0].slots) == ("model", 1)
            engine.work(job(1, "go>"))
            result = await events.ends(1)
            assert result.text == "".join(events.texts[1]) == HELLO
            assert result.finish == "stop"
            assert result.prompt_tokens == len("user:go>")
            assert result.tokens == len(HELLO.encode()) + 1  # and the end
            # Characters came whole, though each byte is a token.
            assert events.texts[1] == list(HELLO)

    asyncio.run(scenario())


def test_turns_go_through_the_template_as_huggingface_would_render_it(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, _):
            assert await engine.measure(conversation("a", "日", "b")) == len(
                "user:a|assistant:..日|user:b"
            )
            system = (ChatMessage("system", "s"), *conversation("a"))
            assert await engine.measure(system) == len("system:s|user:a")
            text = "a\u2028 {{ 1 }} {% if %}"
            assert await engine.measure(conversation(text)) == len(f"user:{text}".encode())

    asyncio.run(scenario())


def test_what_cannot_be_asked_is_refused_and_the_process_lives(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            with pytest.raises(InvalidPromptError, match="template refuses"):
                await engine.measure(conversation("refuse"))
            with pytest.raises(InvalidPromptError, match="Unicode"):
                await engine.measure(conversation("\ud800"))
            with pytest.raises(InvalidPromptError, match="too large"):
                await engine.measure(conversation("a" * (limits.MAX_PROMPT_BYTES + 1)))
            for each, text in ((10, "\ud800"), (11, "a" * (limits.MAX_PROMPT_BYTES + 1))):
                engine.work(job(each, text))
                assert each not in events.failed  # not from inside the call
                assert (await events.fails(each)).code == "prompt"
            engine.work(job(2, "refuse"))
            assert (await events.fails(2)).code == "prompt"
            engine.work(job(3, "nan!"))
            failure = await events.fails(3)
            assert (failure.code, failure.reason) == (
                "engine",
                "The model computed no valid numbers.",
            )
            engine.work(job(4, "go>"))
            assert (await events.ends(4)).text == HELLO
            assert not events.lost

    asyncio.run(scenario())


def test_a_text_ends_at_its_limits(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            engine.work(job(1, "x", max_tokens=7))
            result = await events.ends(1)
            assert (result.text, result.finish, result.tokens) == ("x" * 7, "length", 7)
            # Cut in the middle of the face, four tokens long: nothing of it is shown.
            engine.work(job(2, "go>", max_tokens=5))
            result = await events.ends(2)
            assert (result.text, result.finish) == (" hi", "length")
            # Cut by what is left of the context.
            prompt = "a" * (CONTEXT_TOKENS - len("user:x") - 9) + "x"
            engine.work(job(3, prompt, max_tokens=1000))
            result = await events.ends(3)
            assert (result.text, result.prompt_tokens) == ("x" * 9, CONTEXT_TOKENS - 9)
            engine.work(job(4, "a" * CONTEXT_TOKENS))
            failure = await events.fails(4)
            assert failure.code == "context"
            assert str(CONTEXT_TOKENS + len("user:")) in failure.reason
            assert str(CONTEXT_TOKENS) in failure.reason
            engine.work(job(5, "a" * (CONTEXT_TOKENS - len("user:"))))
            assert (await events.fails(5)).code == "context"

    asyncio.run(scenario())


def test_a_text_that_goes_round_and_round_is_ended(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            engine.work(job(1, "x", max_tokens=LONG))
            result = await events.ends(1)
            assert (result.text, result.finish, result.tokens) == ("x" * 64, "loop", 64)
            engine.work(job(2, "x", max_tokens=64))
            assert (await events.ends(2)).finish == "loop"
            engine.work(job(3, "x", max_tokens=63))
            assert (await events.ends(3)).finish == "length"
        async with running(tiny, ends_loops=False) as (engine, events):
            engine.work(job(1, "x", max_tokens=1000))
            result = await events.ends(1)
            assert (result.finish, result.tokens) == ("length", 1000)

    asyncio.run(scenario())


def test_a_graph_of_another_kind_is_run_by_genai_or_refused(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with running(tiny) as (_, events):
            assert events.ready[0].slots == 1
        assert "by back end genai" in caplog.text
        assert "cannot stay in one place" in caplog.text
        async with running(tiny, backend="slots", load=False) as (_, events):
            reason = await events.loses()
            assert "cannot stay in one place" in reason
            assert "model.backend" in reason

    asyncio.run(scenario())


def test_stop_strings_special_tokens_and_bytes_that_are_no_character(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            engine.work(job(1, "go>", stop=("日語", "never")))
            result = await events.ends(1)
            assert (result.text, result.finish) == (" hi😀é", "stop")
            assert "".join(events.texts[1]) == result.text
            engine.work(job(2, "go>", stop=("日本",)))
            assert (await events.ends(2)).text == HELLO
            engine.work(job(3, "%"))
            assert (await events.ends(3)).text == "Z"
            engine.work(job(4, "#"))
            assert (await events.ends(4)).text == "\ufffdAB"
            engine.work(job(5, "go>", stream=False))
            assert (await events.ends(5)).text == HELLO
            assert 5 not in events.texts

    asyncio.run(scenario())


def test_a_seed_means_the_same_text(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            for at, seed in enumerate((1, 2, 1)):
                engine.work(job(at, "9", temperature=1.0, seed=seed))
            texts = [(await events.ends(at)).text for at in range(3)]
            assert texts[0] == texts[2] != texts[1]
            assert all(text.isdigit() for text in texts)
            engine.work(job(9, "9"))
            assert (await events.ends(9)).text == "0" * 32

    asyncio.run(scenario())


def test_jobs_beyond_the_slots_wait_in_order_and_can_be_cancelled(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            engine.work(job(1, "9", temperature=1.0, max_tokens=LONG))
            for each in (2, 3, 4):
                engine.work(job(each, "go>"))
            await events.writes(1)
            engine.cancel(3)
            engine.cancel(77)
            started = time.monotonic()
            engine.cancel(1)
            await events.ends(4)
            assert time.monotonic() - started < 1
            written = len(events.texts[1])
            assert list(events.done) == [2, 4]
            engine.work(job(5, "go>"))
            await events.ends(5)
            assert len(events.texts[1]) == written
            assert not events.failed

    asyncio.run(scenario())


def test_measuring_does_not_wait_for_a_job(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            engine.work(job(1, "9", temperature=1.0, max_tokens=LONG))
            await events.writes(1)
            counts = await asyncio.gather(
                *(engine.measure(conversation("a" * n)) for n in range(20))
            )
            assert counts == [len("user:") + n for n in range(20)]
            assert not events.done
            engine.cancel(1)

    asyncio.run(scenario())


def test_a_question_asked_while_the_model_loads_is_answered(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny, load=False) as (engine, events):
            engine.work(job(1, "go>"))
            assert await engine.measure(conversation("a")) == len("user:a")
            assert (await events.ends(1)).text == HELLO

    asyncio.run(scenario())


def test_a_process_that_is_killed_is_replaced(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            engine.work(job(1, "9", temperature=1.0, max_tokens=LONG))
            engine.work(job(2, "go>"))
            await events.writes(1)
            os.kill(pid_of(engine), signal.SIGKILL)
            with pytest.raises(EngineError):
                await engine.measure(conversation("a"))
            assert "SIGKILL" in await events.loses()
            assert engine.pid is None
            engine.work(job(3, "go>"))
            assert "down" in (await events.fails(3)).reason
            with pytest.raises(EngineError, match="down"):
                await engine.measure(conversation("a"))
            await events.loads(2)
            assert engine.restarts == 1
            engine.work(job(4, "go>"))
            assert (await events.ends(4)).text == HELLO
            assert list(events.done) == [4]

    asyncio.run(scenario())


def test_a_job_given_between_the_death_and_its_news_is_lost_not_failed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever hears of a loss tries the job again; of a failure, he does not.
    really_end = engine_module._end

    async def end_slowly(process: Process) -> None:
        await really_end(process)
        await asyncio.sleep(0.3)

    monkeypatch.setattr(engine_module, "_end", end_slowly)

    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            os.kill(pid_of(engine), signal.SIGKILL)
            while engine.pid is not None:  # noqa: ASYNC110 - it has no event to wait for
                await asyncio.sleep(0.01)
            assert not events.lost
            engine.work(job(1, "go>"))
            await events.loses()
            await events.loads(2)
            assert not events.failed

    asyncio.run(scenario())


def test_a_process_that_hangs_is_replaced(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny, hang_s=1.6) as (engine, events):
            # Without work, silence is no sign of anything.
            await asyncio.sleep(2)
            assert not events.lost
            os.kill(pid_of(engine), signal.SIGSTOP)
            started = time.monotonic()
            engine.work(job(1, "9", temperature=1.0, max_tokens=LONG))
            assert "said nothing" in await events.loses()
            assert 1.2 < time.monotonic() - started < 5
            await events.loads(2)
            # A long job that goes on is no hang, streamed or not.
            engine.work(job(2, "9", temperature=1.0, max_tokens=LONG, stream=False))
            assert (await events.ends(2)).tokens == LONG
            assert len(events.lost) == 1

    asyncio.run(scenario())


def test_a_process_that_hangs_in_the_middle_of_an_answer_is_replaced(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny, hang_s=0.8) as (engine, events):
            engine.work(job(1, "9", temperature=1.0, max_tokens=LONG))
            await events.writes(1)
            hung = pid_of(engine)
            os.kill(hung, signal.SIGSTOP)
            assert "said nothing" in await events.loses()
            assert not alive(hung)
            await events.loads(2)
            engine.work(job(1, "go>"))  # the daemon's second try
            assert (await events.ends(1)).text == HELLO

    asyncio.run(scenario())


def test_a_process_without_memory_says_so_or_is_replaced(smollm2: Path) -> None:
    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots") as (engine, events):
            starved = pid_of(engine)
            used = int(process_file(starved, "statm").split()[0]) * resource.getpagesize()
            resource.prlimit(starved, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
            engine.work(job(1, "word " * 1_500, max_tokens=200))
            async with asyncio.timeout(20):
                while not (events.failed or events.lost or events.done):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert not events.done
            if not events.lost:
                assert "model" in events.failed[1].reason or "memory" in events.failed[1].reason
                resource.prlimit(starved, resource.RLIMIT_AS, (-1, -1))
            else:
                await events.loads(2)
            engine.work(job(2, "1+1?", max_tokens=4))
            assert (await events.ends(2)).tokens > 0

    asyncio.run(scenario())


def test_a_process_that_hangs_while_it_loads_is_replaced(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny, load_s=3, load=False) as (engine, events):
            os.kill(pid_of(engine), signal.SIGSTOP)
            assert "while loading" in await events.loses()
            await events.loads()

    asyncio.run(scenario())


def test_a_provider_that_takes_the_process_along_is_not_tried_again(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(tiny, provider="webgpu", load=False) as (engine, events):
            os.kill(pid_of(engine), signal.SIGKILL)
            await events.loads()
            said = "webgpu cannot be used, the CPU is until edgemoa is started again: The model"
            assert said in engine.note
            os.kill(pid_of(engine), signal.SIGKILL)
            await events.loads(2)
            assert said in engine.note
            assert caplog.text.count(said) == 1

    asyncio.run(scenario())


def test_restarts_come_slower_until_a_process_has_lasted(tiny: Path, tmp_path: Path) -> None:
    async def delays(model: Path, settled_s: float) -> list[float]:
        lost_at = []
        async with running(model, settled_s=settled_s, load=False) as (engine, events):
            for times in (1, 2, 3):
                if model == tiny:
                    await events.loads(times)
                    os.kill(pid_of(engine), signal.SIGKILL)
                await events.loses(times)
                lost_at.append(time.monotonic())
        return [after - before for before, after in itertools.pairwise(lost_at)]

    first, second = asyncio.run(delays(tmp_path / "nowhere", 60))
    assert first >= 0.25
    assert second >= 0.5
    _, second = asyncio.run(delays(tiny, 0))
    assert second >= 0.25
    _, slower = asyncio.run(delays(tiny, 60))
    assert slower >= 0.5


def test_a_stopped_process_does_not_hold_up_the_end(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, _):
            os.kill(pid_of(engine), signal.SIGSTOP)

    asyncio.run(scenario())


@pytest.mark.parametrize("flaw", ["no folder", "empty", "damaged", "not json", "no tokens"])
def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_less_and_less(
    tiny: Path, tmp_path: Path, flaw: str
) -> None:
    folder = tmp_path / "model"
    if flaw != "no folder":
        shutil.copytree(tiny, folder)
    match flaw:
        case "empty":
            for file in folder.iterdir():
                file.unlink()
        case "damaged":
            (folder / "model.onnx").write_bytes(b"damaged")
        case "not json":
            (folder / "genai_config.json").write_text("{")
        case "no tokens":
            (folder / "tokenizer.json").unlink()
    expected = {
        "no folder": "no model folder at",
        "empty": "genai_config.json",
        "damaged": "cannot be loaded",
        "not json": "genai_config.json",
        "no tokens": "no tokenizer.json",
    }[flaw]

    async def scenario() -> None:
        async with running(folder, load=False) as (_, events):
            reason = await events.loses(2)
            assert expected in reason
            assert "Import" in reason  # what to do about it
            assert not events.ready

    asyncio.run(scenario())


def test_a_model_that_breaks_while_it_is_used_is_tried_until_it_is_whole(
    tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")

    async def scenario() -> None:
        async with running(folder) as (engine, events):
            engine.work(job(1, "9", temperature=1.0, max_tokens=LONG))
            await events.writes(1)
            whole = (folder / "model.onnx").read_bytes()
            (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])
            os.kill(pid_of(engine), signal.SIGKILL)
            assert "SIGKILL" in await events.loses()
            for times in (2, 3):
                assert "cannot be loaded" in await events.loses(times)
            engine.work(job(1, "go>"))
            with suppress(EngineError):
                await engine.measure(conversation("a"))
            (folder / "model.onnx").write_bytes(whole)
            await events.loads(2)
            engine.work(job(2, "go>"))
            assert (await events.ends(2)).text == HELLO

    asyncio.run(scenario())


def test_how_fast_the_model_is_is_told_beside_other_news(tiny: Path, smollm2: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            assert events.ready[0].backend == "genai"
            engine.work(job(1, "9", temperature=1.0, max_tokens=2_000))
            result = await events.ends(1)
            (rates,) = events.rates
            assert {each.rows for each in rates.decode} == {1}
            assert len(rates.prefill) == 1
            estimate = rates.estimate(result.prompt_tokens, result.tokens, 1)
            assert estimate is not None
            assert result.model_ms / 2 < estimate < 2 * result.work_ms
        async with running(smollm2, threads=2, backend="slots", slots=3) as (engine, events):
            info = events.ready[0]
            assert (info.backend, info.slots, info.threads) == ("slots", 3, 2)
            assert info.budget_tokens >= 3 * 1024
            for each in (1, 2, 3):
                engine.work(job(each, f"Count to {each}0.", max_tokens=40, stream=False))
            results = [await events.ends(each) for each in (1, 2, 3)]
            assert {each.rows for each in events.rates[-1].decode} >= {2}
            # Shares add up to what there was, though each waited for the others.
            shares = sum(result.model_ms for result in results)
            assert shares < 1.1 * max(result.work_ms for result in results) + 50
            assert shares > 0.6 * max(result.work_ms for result in results)

    asyncio.run(scenario())


def test_a_measure_ends_with_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path / "nowhere", load=False) as (engine, _):
            with pytest.raises(EngineError, match="no model folder"):
                await engine.measure(conversation("a"))

    asyncio.run(scenario())


def test_stopping_leaves_nothing_whatever_is_under_way(tiny: Path) -> None:
    async def scenario() -> None:
        for wait_s in (0.0, 0.05, 0.3):
            engine = Engine(tiny, "model", 1, Recorder())
            await engine.start()
            pid = pid_of(engine)
            await asyncio.sleep(wait_s)
            await engine.stop()
            await engine.stop()
            assert not alive(pid)

    asyncio.run(scenario())


def test_stopping_ends_a_question_that_waits(tiny: Path) -> None:
    async def scenario() -> None:
        engine = Engine(tiny, "model", 1, Recorder())
        await engine.start()
        question = asyncio.create_task(engine.measure(conversation("a")))
        await asyncio.sleep(0)
        await engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await question
        with pytest.raises(EngineError, match="down"):
            await engine.measure(conversation("a"))

    asyncio.run(scenario())


def test_the_daemon_killed_takes_the_model_process_along(tiny: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n"
        "from engine.harness import job, running\n"
        "async def main():\n"
        "    async with running(Path(sys.argv[1])) as (engine, events):\n"
        f"        engine.work(job(1, '9', temperature=1.0, max_tokens={LONG}))\n"
        "        await events.writes(1)\n"
        "        print(engine.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tiny)], stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        assert alive(pid)
        daemon.kill()
        assert gone(pid, within_s=2)


def spawn_worker(model: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgemoa.engine.worker", str(model), "--threads", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def test_the_model_process_ends_with_its_stdin_in_the_middle_of_a_job(tiny: Path) -> None:
    with spawn_worker(tiny) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        reader = frames.event_reader()
        assert isinstance(reader.feed(os.read(worker.stdout.fileno(), 65536))[0], frames.Ready)
        long = job(1, "9", temperature=1.0, max_tokens=LONG, stream=False)
        worker.stdin.write(
            frames.encode(frames.Generate(1, long.messages, long.sampling, long.stream))
        )
        worker.stdin.flush()
        time.sleep(0.1)
        assert worker.poll() is None
        worker.stdin.close()
        assert worker.wait(timeout=2) == 0
        assert not any(isinstance(e, frames.Done) for e in reader.feed(worker.stdout.read()))


def test_how_fast_the_model_is_is_said_with_the_last_of_some_jobs(tiny: Path) -> None:
    with spawn_worker(tiny) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        asked = (frames.Generate(n, conversation("go>"), Sampling(), True) for n in range(5))
        worker.stdin.write(b"".join(map(frames.encode, asked)))
        worker.stdin.flush()
        reader, told = frames.event_reader(), list[frames.Event]()
        while not any(isinstance(event, frames.Pace) for event in told):
            told += reader.feed(os.read(worker.stdout.fileno(), 65536))
        assert isinstance(told[-1], frames.Pace)
        assert [event.job_id for event in told if isinstance(event, frames.Done)] == [*range(5)]
        worker.stdin.close()
        assert not worker.stdout.read()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\2\x81\xa1"])
def test_bytes_that_are_no_frame_end_the_model_process(tiny: Path, data: bytes) -> None:
    with spawn_worker(tiny) as worker:
        assert worker.stdin is not None
        worker.stdin.write(data)
        worker.stdin.flush()
        assert worker.wait(timeout=10) == EngineError.exit_code


def test_frames_come_out_as_they_went_in_however_they_are_cut() -> None:
    sent: list[frames.Event] = [
        frames.Progress(),
        frames.Text(1, "日" * 1000),
        frames.Measured(2, 3),
    ]
    data = b"".join(frames.encode(frame) for frame in sent)
    for size in (1, 3, len(data)):
        reader = frames.event_reader()
        got = [
            frame for at in range(0, len(data), size) for frame in reader.feed(data[at : at + size])
        ]
        assert got == sent


def test_the_daemon_side_refuses_what_is_no_event() -> None:
    for data in (b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", frames.encode(frames.Cancel(1))):
        with pytest.raises(EngineError):
            frames.event_reader().feed(data)
    with pytest.raises(EngineError, match="too large"):
        frames.encode(frames.Text(1, "x" * (4 << 20)))


@pytest.mark.parametrize(
    "event",
    [
        frames.Done(1, WorkDone("x", "stop", 10, 10, -1, 5)),
        frames.Done(1, WorkDone("x", "stop", 10, 2**40, 1, 5)),
        frames.Done(1, WorkDone("x", "stop", 10, 10, 1, 5, model_ms=2**60)),
        frames.Measured(1, -1),
        frames.Ready(2048, 0, 10),
        frames.Ready(-1, 1, 10),
        frames.Scored(-1, (frames.Likelihood(float("nan"), 3),)),
    ],
)
def test_numbers_that_no_board_would_believe_end_at_the_pipe(event: frames.Event) -> None:
    with pytest.raises(EngineError, match="damaged"):
        frames.event_reader().feed(frames.encode(event))


def test_prompts_do_not_pile_up_before_a_process_that_does_not_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_UNREAD_BYTES", 1 << 20)

    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            hung = pid_of(engine)
            os.kill(hung, signal.SIGSTOP)
            for number in range(1, 41):  # each comes, and is called off
                engine.work(job(number, "x" * 100_000))
                engine.cancel(number)
            assert engine._stdin is not None
            assert engine._stdin.transport.get_write_buffer_size() < 2 << 20
            engine.work(job(99, "x"))
            assert "behind" in (await events.fails(99)).reason
            os.kill(hung, signal.SIGCONT)
            while engine._stdin.transport.get_write_buffer_size():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
            engine.work(job(100, "go>"))
            assert (await events.ends(100)).text == HELLO
            assert not events.lost

    asyncio.run(scenario())


def test_nothing_of_a_prompt_is_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        async with running(tiny) as (engine, events):
            for at, text in enumerate(("secret>", "secret!", "secret" * (CONTEXT_TOKENS // 6))):
                engine.work(job(at, text))
            with pytest.raises(InvalidPromptError) as refused:
                await engine.measure(conversation("secret\ud800"))
            assert "secret" not in str(refused.value)
            await events.fails(2)
            assert not any("secret" in failure.reason for failure in events.failed.values())

    asyncio.run(scenario())
    assert "secret" not in caplog.text


def test_the_model_process_is_kinder_than_the_daemon(tiny: Path) -> None:
    async def scenario() -> None:
        async with running(tiny) as (engine, _):
            assert os.getpriority(os.PRIO_PROCESS, pid_of(engine)) >= min(
                19, os.getpriority(os.PRIO_PROCESS, 0) + 5
            )
            own = int(process_file("self", "oom_score_adj"))
            assert int(process_file(pid_of(engine), "oom_score_adj")) == min(1000, own + 500)
            environment = process_file(pid_of(engine), "environ")
            assert "EDGEMOA" not in environment
            assert "HOME=" not in environment

    asyncio.run(scenario())


def test_a_failing_listener_is_reported_and_leaves_no_process(tiny: Path) -> None:
    class Broken(Recorder):
        def on_text(self, *_: object, **__: object) -> None:
            raise RuntimeError("a bug")

    async def scenario() -> None:
        reported: asyncio.Queue[BaseException] = asyncio.Queue()
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.put_nowait(context["exception"])
        )
        events = Broken()
        engine = Engine(tiny, "model", 1, events)
        await engine.start()
        await events.loads()
        pid = pid_of(engine)
        engine.work(job(1, "go>"))
        async with asyncio.timeout(5):
            error = await reported.get()
        assert isinstance(error, ExceptionGroup)
        assert error.subgroup(RuntimeError)
        assert not alive(pid)
        await engine.stop()

    asyncio.run(scenario())
