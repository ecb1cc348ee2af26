"""Options: one name for flag, configuration key and field; nothing misspelt passes."""

import argparse

import pytest

from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.options import ExpertCacheOptions, config_key, flag
from vllm_hlwq.plugin import add_flags, configure, merge_flags


def test_one_rule_gives_flag_and_key() -> None:
    assert flag("cache_size") == "--moe-expert-cache-size"
    assert config_key("cache_size") == "moe_expert_cache_size"


@pytest.mark.parametrize("config", [None, {}, {"gdn_prefill_backend": "x"}, {"moe_expert_cache_size": 0}])
def test_absent_or_zero_is_off(config: object) -> None:
    assert ExpertCacheOptions.from_additional_config(config).cache_size == 0


def test_a_size_is_read_beside_other_plugins_keys() -> None:
    config = {"moe_expert_cache_size": 4, "other": {"a": 1}}
    assert ExpertCacheOptions.from_additional_config(config).cache_size == 4


@pytest.mark.parametrize("value", [-1, 2.5, "4", "all", True, None])
def test_a_size_that_is_no_count_is_refused_by_name_and_value(value: object) -> None:
    with pytest.raises(ExpertCacheError, match=r"^moe_expert_cache_size=") as caught:
        ExpertCacheOptions.from_additional_config({"moe_expert_cache_size": value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", True])
def test_a_staging_size_that_is_no_count_is_refused_by_name_and_value(value: object) -> None:
    config = {"moe_expert_cache_size": 4, "moe_expert_staging_size": value}
    with pytest.raises(ExpertCacheError, match=rf"^moe_expert_staging_size={value!r}: .* 1 or more"):
        ExpertCacheOptions.from_additional_config(config)


def test_a_staging_size_without_a_cache_is_refused() -> None:
    config = Arguments({"moe_expert_staging_size": 4})
    with pytest.raises(
        ExpertCacheError, match=r"--moe-expert-staging-size 4 has no meaning without --moe-expert-cache"
    ):
        configure(config)


def test_auto_is_a_size_until_a_worker_settles_it() -> None:
    options = ExpertCacheOptions.from_additional_config({"moe_expert_cache_size": "auto"})
    assert options.cache_size == "auto"
    with pytest.raises(ExpertCacheError, match="has not been settled before the model was built"):
        _ = options.slots
    assert ExpertCacheOptions(cache_size=3).slots == 3


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_a_floor_that_is_no_count_is_refused_by_name_and_value(value: object) -> None:
    config = {"moe_expert_cache_size": "auto", "moe_expert_kv_floor_seqs": value}
    with pytest.raises(ExpertCacheError, match=rf"^moe_expert_kv_floor_seqs={value!r}: .* of sequences, 1 or more"):
        ExpertCacheOptions.from_additional_config(config)


@pytest.mark.parametrize(("size", "needed"), [(0, ""), (4, " auto")])
def test_a_floor_without_auto_is_refused(size: int, needed: str) -> None:
    config = Arguments({"moe_expert_cache_size": size, "moe_expert_kv_floor_seqs": 4})
    wanted = f"--moe-expert-kv-floor-seqs 4 has no meaning without --moe-expert-cache-size{needed}; "
    with pytest.raises(ExpertCacheError, match=wanted):
        configure(config)


def test_a_misspelt_option_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ExpertCacheError, match=r"moe_expert_cache_sise .*known options: moe_expert_cache_size"):
        ExpertCacheOptions.from_additional_config({"moe_expert_cache_sise": 4})


class Arguments:
    def __init__(self, additional_config: dict | None) -> None:
        self.additional_config = additional_config


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser)
    add_flags(parser)  # a second call leaves the first one's flags alone
    return parser.parse_args(words)


def test_the_flag_reaches_additional_config() -> None:
    arguments = Arguments({"other": 1})
    merge_flags(arguments, parse("--moe-expert-cache-size", "4", "--moe-expert-staging-size", "8"))
    assert arguments.additional_config == {"other": 1, "moe_expert_cache_size": 4, "moe_expert_staging_size": 8}


def test_auto_reaches_additional_config_as_a_word() -> None:
    arguments = Arguments(None)
    merge_flags(arguments, parse("--moe-expert-cache-size", "auto", "--moe-expert-kv-floor-seqs", "3"))
    assert arguments.additional_config == {"moe_expert_cache_size": "auto", "moe_expert_kv_floor_seqs": 3}


def test_no_flag_leaves_additional_config_alone() -> None:
    arguments = Arguments({"moe_expert_cache_size": 3})
    merge_flags(arguments, parse())
    assert arguments.additional_config == {"moe_expert_cache_size": 3}


def test_flag_and_additional_config_may_not_contradict() -> None:
    with pytest.raises(SystemExit, match=r"4 contradicts .*moe_expert_cache_size=3"):
        merge_flags(Arguments({"moe_expert_cache_size": 3}), parse("--moe-expert-cache-size", "4"))


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "", "AUTO"])
def test_the_parser_refuses_what_is_no_count(value: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=r"whole number of experts, 0 \(off\) or more, or auto"):
        parse(f"--moe-expert-cache-size={value}")


def test_no_other_option_is_automatic() -> None:
    with pytest.raises(argparse.ArgumentError, match="'auto' is not a whole number of sequences, 1 or more"):
        parse("--moe-expert-kv-floor-seqs=auto")
