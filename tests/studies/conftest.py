"""Shared by tests of studies."""

from pathlib import Path

import pytest
import yaml
from helpers.studies import SMALL, FakeSlot, Hub

from ldlm.studies import scheduler as study_room


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    monkeypatch.setattr(
        study_room, "make_slots", lambda *_: (lambda failed: [FakeSlot(hub, failed) for _ in range(hub.slots)])(set())
    )
    Path("small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    Path("mine.yaml").write_text("# Mine.\nmodel: {sigma_dec: 3.0}\n")
    return hub
