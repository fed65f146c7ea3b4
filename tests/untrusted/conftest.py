"""Shared by tests of files that are not to be believed."""

import signal
import threading

import pytest
from helpers.tiny import make_model, make_tokenizer, save_both


@pytest.fixture(autouse=True)
def no_case_takes_long():
    """A hang fails after two minutes."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this hangs"))
        signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with everything in it, its digest beside it, and an export."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(tokenizer=make_tokenizer())
    save_both(model, folder)
    return folder
