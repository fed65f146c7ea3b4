"""Layers are compiled one by one; a model or a task that was compiled whole is refused."""

import pytest
import torch
from helpers.tiny import make_data, make_model, make_task, make_trainer


def in_place(module: torch.nn.Module) -> torch.nn.Module:
    module.compile(backend="eager")
    return module


def wrapped(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("compiled", [in_place, wrapped])
@pytest.mark.parametrize("part", ["model", "task"])
def test_a_model_or_a_task_compiled_whole_is_refused_before_the_first_step(tmp_path, compiled, part):
    trainer, said = make_trainer(tmp_path, []), "cannot compile a whole LDLM or its LDLMTask"
    if (part, compiled) == ("model", wrapped):
        said = "model is of type OptimizedModule, and an LDLM is wanted"
    with pytest.raises(ValueError, match=f"{said}.*CompileBlocks"):  # noqa: PT012  # a task refuses when it is made
        task = make_task(model=compiled(make_model())) if part == "model" else compiled(make_task())
        trainer.fit(task, make_data(tmp_path))
    assert trainer.global_step == 0
