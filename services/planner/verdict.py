"""Whether to split, and why.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.planner.report import Interval, Option, Outcome, Verdict, interval

# Two kinds of workers, a transfer and a ratio to keep right are not worth less than this.
WORTHWHILE = 0.05
_FEW_WORKERS = 4
# By so much less of the time are colocated workers busy that it is why they cost more.
_IDLER = 0.05


def judge(outcomes: Sequence[Outcome], share: float, when_none: str) -> Verdict:
    """From the fleets for ``share``.  ``when_none``: what to say where nothing keeps the objectives."""
    options = [outcome.option for outcome in outcomes if outcome.share == share and outcome.option is not None]
    colocated = next((option for option in options if option.prefill is None), None)
    splits = sorted((option for option in options if option.prefill is not None), key=lambda o: o.usd_per_hour)
    if not options:
        return Verdict(
            False,
            f"No fleet was found that keeps these objectives for {share:.0%} of the requests.",
            when_none,
            "",
            None,
        )
    if not splits:
        reason = (
            f"No split fleet was found that keeps the objectives for {share:.0%} of the requests; a colocated one does."
        )
        return Verdict(False, "Do not split.", reason, "", None)
    split = splits[0]
    if colocated is None:
        reason = (
            f"No colocated fleet keeps the objectives for {share:.0%} of the requests, with any chunk size tried: "
            "a prompt's chunk delays the running answers too long, or smaller chunks the first token. A split one does, "
            f"for ${split.usd_per_hour:.2f} an hour."
        )
        price = (
            f"Split, the first token comes at {split.first_token.p50.mean:.3g} s at the median and "
            f"{split.first_token.p90.mean:.3g} s at p90, the second at {split.second_token.p50.mean:.3g} s at the median."
        )
        return Verdict(True, "Split: only a split fleet keeps these objectives.", reason, price, None)
    saves = savings(colocated, split)
    # Under every seed, not on average.
    by_seed = _by_seed(colocated, split)
    worthwhile = min(by_seed) >= WORTHWHILE
    price = _price(colocated, split)
    if worthwhile:
        headline = f"Split ({_hardware(split)}): it saves {_percent(saves)} of the cost."
        return Verdict(True, headline, _why_split(colocated, split), price, saves)
    if abs(saves.mean) < 0.005:
        headline = "Do not split: the cheapest split fleet costs as much as the colocated one."
    elif saves.mean > 0:
        headline = f"Do not split: it would save {_percent(saves)}, and that not under every arrival order."
        if min(by_seed) > 0:
            headline = f"Do not split: it would save {_percent(saves)}, too little for what it takes to run."
    else:
        headline = f"Do not split: the cheapest split fleet costs {_percent(Interval(-saves.mean, saves.half))} more."
    return Verdict(False, headline, _why_not(colocated, split), price, saves)


def savings(colocated: Option, split: Option) -> Interval:
    return interval(_by_seed(colocated, split))


def _by_seed(colocated: Option, split: Option) -> list[float]:
    pairs = zip(split.usd_per_hour_by_seed, colocated.usd_per_hour_by_seed, strict=True)
    return [1 - ours / theirs for ours, theirs in pairs]


def _why_split(colocated: Option, split: Option) -> str:
    parts = [
        f"${split.usd_per_hour:.2f} an hour for {_fleet(split)}, ${colocated.usd_per_hour:.2f} for {_fleet(colocated)}."
    ]
    if _device(split.prefill) != _device(split.decode):
        parts.append(
            f"Prompts are computed where FLOP/s are cheap ({_device(split.prefill)}), answers where bandwidth is."
        )
    num_workers = split.num_prefill + split.num_decode
    busy = (split.num_prefill * split.prefill_busy.mean + split.num_decode * split.decode_busy.mean) / num_workers
    if colocated.decode_busy.mean < busy - _IDLER:
        parts.append(
            f"Colocated workers must stay {1 - colocated.decode_busy.mean:.0%} idle, or prompts delay running answers too "
            "long."
        )
    elif colocated.mixed_tokens < split.step_tokens:
        parts.append(
            f"Colocated workers keep gaps short with chunks of {colocated.mixed_tokens} tokens, each of which reads all "
            f"weights again; prefill workers compute {split.step_tokens} at once."
        )
    return " ".join(parts)


def _why_not(colocated: Option, split: Option) -> str:
    parts = [
        f"${colocated.usd_per_hour:.2f} an hour for {_fleet(colocated)}, ${split.usd_per_hour:.2f} for {_fleet(split)}."
    ]
    if colocated.num_decode <= _FEW_WORKERS:
        parts.append(
            "The traffic is so light that a few workers serve it, and a split fleet needs one of each role at least, of "
            f"which one is {1 - min(split.prefill_busy.mean, split.decode_busy.mean):.0%} idle. More traffic may turn "
            "this: try --speed or --rate."
        )
    else:
        parts.append(
            f"Chunks of {colocated.mixed_tokens} tokens fill the compute that decoding leaves idle, and the objective on "
            "gaps is loose enough for them."
        )
    return " ".join(parts)


def _price(colocated: Option, split: Option) -> str:
    def change(ours: Interval, theirs: Interval) -> str:
        return f"{theirs.mean:.3g} s to {ours.mean:.3g} s"

    return (
        f"From colocated to split, the first token goes from "
        f"{change(split.first_token.p50, colocated.first_token.p50)} at the median and from "
        f"{change(split.first_token.p90, colocated.first_token.p90)} at p90; the second, which waits for the "
        f"handover, from {change(split.second_token.p50, colocated.second_token.p50)} at the median. "
        f"The 99th percentile of gaps goes from {colocated.itl.p99.mean * 1e3:.3g} ms "
        f"to {split.itl.p99.mean * 1e3:.3g} ms."
    )


def _percent(saves: Interval) -> str:
    spread = f" ± {100 * saves.half:.0f}" if saves.half >= 0.005 else ""
    return f"{100 * saves.mean:.0f}{spread} %"


def _fleet(option: Option) -> str:
    instances = " and ".join(f"{count} {name}" for name, count in option.instances.items())
    rented = f" in {instances}" if instances else ""
    if option.prefill is None:
        return f"{option.num_decode} colocated workers of {option.decode}{rented}"
    return f"{option.num_prefill} prefill of {option.prefill} and {option.num_decode} decode of {option.decode}{rented}"


def _hardware(option: Option) -> str:
    if _device(option.prefill) == _device(option.decode):
        return "equal hardware"
    return f"prefill on {_device(option.prefill)}, decode on {_device(option.decode)}"


def _device(worker: str | None) -> str:
    """Of ``4xh100``: ``h100``."""
    assert worker is not None
    count, _, device = worker.partition("x")
    return device if count.isdigit() else worker
