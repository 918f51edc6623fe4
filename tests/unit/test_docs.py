"""The pages: their links lead somewhere, and what they say of flags, settings and errors is so."""

import inspect
import json
import re
from pathlib import Path

import pytest

from kvrouter_grpc import advice
from kvrouter_grpc.config.settings import SETTINGS, WORKER_SETTINGS
from kvrouter_grpc.server import status
from pages import PAGES, ROOT, anchors, blocks, commands, links, prose

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# The reference of the settings is generated from them, and shows on purpose how a misspelt flag is answered.
WRITTEN = [page for page in PAGES if page.name != "configuration.md"]
WRITTEN_PAGE = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


@EVERY_PAGE
def test_python_and_json_blocks_are_whole(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            # Fragments await at the top level; ast accepts that in a function of its own.
            body = "".join(f"    {line}\n" for line in block.text.splitlines())
            compile(f"async def fragment():\n{body}", str(page), "exec")
        elif block.language == "json":
            json.loads(block.text)


@EVERY_PAGE
def test_settings_that_are_named_exist(page: Path) -> None:
    keys = {setting.key for setting in SETTINGS.values()}
    named = re.findall(r"`((?:server|router|events|upstream|log|decisions)\.[a-z][a-z0-9-]+)`", prose(page))
    assert [key for key in named if key not in keys] == []


@WRITTEN_PAGE
def test_router_flags_that_are_named_exist(page: Path) -> None:
    known = {form for setting in SETTINGS.values() for form in (setting.flag, f"--no-{setting.flag[2:]}")}
    named = re.findall(r"(--(?:no-)?router-[a-z0-9-]+)\b(?!\*)(?!-)", page.read_text())
    assert [flag for flag in named if flag not in known] == []


@WRITTEN_PAGE
def test_serve_commands_would_start(page: Path) -> None:
    known = {setting.flag for setting in SETTINGS.values()} | {"--config", "--check-config"}
    for block in blocks(page):
        for command in commands(block.text):
            if not command.startswith("kvrouter serve"):
                continue
            flags = re.findall(r"(?<=\s)--[a-z-]+", command)
            assert {re.sub("^--no-router", "--router", flag) for flag in flags} <= known
            for worker in re.findall(r"--worker (\S+)", command):
                keys = {pair.partition("=")[0].replace("-", "_") for pair in worker.split(",")}
                assert {"name", "url", "events", "replay"} <= keys <= WORKER_SETTINGS.keys()


@EVERY_PAGE
def test_engines_are_always_shown_with_events_and_replay(page: Path) -> None:
    for block in blocks(page):
        for command in commands(block.text):
            if "vllm serve" not in command:
                continue
            events = re.search(r"--kv-events-config '([^']*)'", command)
            assert events, f"no KV events: {command}"
            said = json.loads(events[1])
            assert (said["enable_kv_cache_events"], said["publisher"]) == (True, "zmq")
            assert said["endpoint"] != said["replay_endpoint"]
            assert "--enable-prompt-tokens-details" in command
            assert "--block-size" in command


@EVERY_PAGE
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


def test_table_of_errors_is_the_table_of_the_server() -> None:
    rows = re.findall(
        r"^\| ([A-Z_, ]+) \| ([A-Z_, ]+) \| (yes|no) \| (.+) \|$", prose(ROOT / "docs/errors.md"), re.MULTILINE
    )
    told = {
        reason: (set(codes.split(", ")), retry == "yes")
        for reasons, codes, retry, _ in rows
        for reason in reasons.split(", ")
    }
    true = {kind.reason: ({code.name}, kind.retry_after_s is not None) for kind, code in status.CODES.items()}
    true["ENGINE_REJECTED"][0].add("NOT_FOUND")  # see status.code_of
    true["INTERNAL"] = true["ROUTER_ERROR"]  # see status.defect
    assert told == true


def test_defaults_that_are_named_are_the_defaults() -> None:
    text = prose(ROOT / "docs/contract.md")
    assert SETTINGS["router.mode"].default == "kv"
    assert "| `--router-mode` | `round-robin` | `kv` |" in text
    (weight,) = re.findall(r"k = --router-new-work-weight = (\d+)", (ROOT / "docs/contract.md").read_text())
    assert float(weight) == SETTINGS["router.new_work_weight"].default


def _rows_of(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    text = page.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_every_sentence_about_a_worker_has_its_row() -> None:
    """What the running router says is explained where one looks, with the effect that it has."""
    said = {
        advice.events_off(),
        advice.events_nowhere(),
        advice.events_unreached("tcp://host:5557"),
        advice.not_zeromq("tcp://host:8000"),
        advice.no_address("udp://host:5557"),
        advice.wrong_topic("kv", {"a", "b"}),
        advice.block_sizes_differ("w0", 32, "its KV events", 16),
        advice.block_size_misconfigured("w0", 32, 16),
        advice.no_prefix_caching(),
        advice.cached_tokens_untold(),
        advice.reports_reused("9 blocks in a cache of 8"),
        advice.group_unjudged([1, 2]),
    }
    makers = {
        name for name, each in vars(advice).items() if inspect.isfunction(each) and each.__module__ == advice.__name__
    }
    assert len(makers) == len(said), "a sentence is missing above"
    rows = {row[0].strip("`"): row for row in _rows_of(ROOT / "docs" / "troubleshooting.md", "What the findings say")}
    assert rows.keys() == {each.fault for each in said}
    for each in said:
        _, finding, effect, _ = rows[each.fault]
        pattern = re.escape(finding.strip("`")).replace(r"\.\.\.", ".+")
        assert re.fullmatch(pattern, each.seen), each
        assert effect == each.effect.value, each
    effects = [row[0] for row in _rows_of(ROOT / "docs" / "check.md", "What readiness makes of it")]
    assert effects == [effect.value for effect in advice.Effect]
