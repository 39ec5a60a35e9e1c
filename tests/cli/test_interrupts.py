from __future__ import annotations

import signal
import threading

import pytest

from kvferry.cli.interrupts import SIGNALS, CtrlC, Interrupts


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_swallowed_interrupt_is_not_lost(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with Interrupts() as interrupts:
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)  # as if a destructor had swallowed it
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            interrupts.wait()
    assert signal.getsignal(signum) is before


def test_ctrl_c_interrupts_only_where_allowed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt), ctrl_c.allowed():
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_calls_what_it_is_told_to_once_and_raises_nothing() -> None:
    called: list[str] = []
    done = threading.Event()

    def act() -> None:
        called.append(threading.current_thread().name)
        done.set()

    with CtrlC() as ctrl_c:
        with ctrl_c.calling(act):
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            assert done.wait(10)
        signal.raise_signal(signal.SIGINT)
    assert called == ["interrupt"]
