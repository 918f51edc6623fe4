"""What one endpoint has different, and the pools of disaggregated serving."""

from pathlib import Path
from typing import Any

import pytest

from kvrouter_grpc.config import Config, LocalPrefill, effective, load
from kvrouter_grpc.errors import ConfigError

DECODE, PREFILL = "dynamo.decode.generate", "dynamo.prefill.generate"
BOTH: dict[str, Any] = {"--endpoint": [PREFILL, DECODE]}


def of(yaml: str, tmp_path: Path, flags: dict[str, Any] | None = None) -> Config:
    file = tmp_path / "router.yaml"
    file.write_text(yaml)
    return load(flags or {}, {}, file)


def faults(flags: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(flags, {})
    return caught.value.faults


def test_an_endpoint_has_the_common_policy_but_for_its_own_settings(tmp_path: Path) -> None:
    config = of(
        f"""
endpoints: [{PREFILL}, {DECODE}]
router: {{temperature: 0.5, prefill-endpoint: {PREFILL}}}
endpoint-policies:
  - {{endpoint: {PREFILL}, track-active-blocks: false}}
  - endpoint: {DECODE}
    track-prefill-tokens: false
    cost: dynamo
    temperature: 0
""",
        tmp_path,
    )
    prefill, decode = config.router_of(PREFILL), config.router_of(DECODE)
    assert (prefill.temperature, prefill.track_active_blocks, prefill.track_prefill_tokens) == (0.5, False, True)
    assert (decode.temperature, decode.track_active_blocks, decode.track_prefill_tokens) == (0.0, True, False)
    assert (prefill.cost, decode.cost) == ("default", "dynamo")
    assert config.prefill_pools() == {DECODE: PREFILL}
    assert of(effective(config), tmp_path).model_dump() == config.model_dump()


def test_policies_inline() -> None:
    text = f"endpoint={DECODE},prefill-endpoint={PREFILL},no-such=1"
    (fault,) = faults({**BOTH, "--endpoint-policy": [text]})
    assert "no-such is not a setting of one endpoint" in fault
    config = load({**BOTH, "--endpoint-policy": [text.removesuffix(",no-such=1")]}, {})
    assert config.prefill_pools() == {DECODE: PREFILL}
    assert config.router.prefill_endpoint is None


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        ("track-active-blocks=false", "endpoint is missing"),
        (f"endpoint={DECODE},track-active-blocks=maybe", "track-active-blocks 'maybe' is not usable"),
        (f"endpoint={DECODE},kv-events=false", "kv-events is not a setting of one endpoint"),
        (f"endpoint={DECODE},cost=dynamo,cost=default", "cost is given twice"),
        (f"endpoint={DECODE},cost", "'cost' is not key=value"),
        ("endpoint=one.two,cost=dynamo", "endpoint 'one.two' is not usable"),
        ("endpoint=no.such.one,cost=dynamo", "which this router does not serve"),
        (f"endpoint={PREFILL},prefill-endpoint={DECODE}", "has one itself"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(policy: str, fault: str) -> None:
    found = faults({**BOTH, "--router-prefill-endpoint": PREFILL, "--endpoint-policy": [policy]})
    assert any(fault in each for each in found), found


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"--endpoint": [DECODE], "--router-prefill-endpoint": PREFILL}, f"add --endpoint {PREFILL}"),
        ({"--endpoint": [PREFILL], "--router-prefill-endpoint": PREFILL}, "is the only endpoint"),
        ({**BOTH, "--router-conditional-disagg-config": "{"}, "a JSON object is wrong"),
        ({**BOTH, "--router-conditional-disagg-config": '{"isl": 3}'}, "the value of isl is wrong"),
        ({**BOTH, "--router-conditional-disagg-config": '{"eff_isl_ratio_threshold": 2}'}, "ratio_threshold is wrong"),
    ],
)
def test_what_is_wrong_with_the_pools_is_said(flags: dict[str, Any], fault: str) -> None:
    found = faults(flags)
    assert any(fault in each for each in found), found


def test_conditional_disaggregation() -> None:
    pools = {**BOTH, "--router-prefill-endpoint": PREFILL}
    assert load(pools, {}).router.local_prefill is None
    by_default = load({**pools, "--router-conditional-disagg": True}, {}).router.local_prefill
    assert by_default == LocalPrefill(policy="isl_or_ratio", eff_isl_threshold=2048, eff_isl_ratio_threshold=None)
    # (uncached, prompt) on either side of both limits
    cases = [(2047, 2047), (2048, 2048), (2999, 10_000), (3000, 10_000), (0, 10_000)]
    assert [by_default.holds(*case) for case in cases] == [True, False, True, False, True]
    dynamo = LocalPrefill(policy="isl_bounding")
    cases = [(2047, 10_000), (2048, 10_000), (70, 100), (69, 100), (0, 10_000)]
    assert [dynamo.holds(*case) for case in cases] == [True, False, False, True, True]
    either = LocalPrefill(policy="isl_or_ratio", eff_isl_threshold=100, eff_isl_ratio_threshold=0.5)
    assert [either.holds(*case) for case in [(99, 99), (100, 100), (499, 1000), (500, 1000)]] == [
        True,
        False,
        True,
        False,
    ]
