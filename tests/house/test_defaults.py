"""An argument that was left out is `None`, never whatever happens to be false: a part may have a length of 0."""

import ast

import pytest
import torch
from helpers import ROOT
from helpers.tiny import HIDDEN, LATENT, LENGTH, VOCAB, FixedTokenEncoder, make_model

from ldlm.diffusion.grids import MixedGrid, UniformGrid
from ldlm.diffusion.samplers import DDIM
from ldlm.diffusion.schedules import TangentSchedule
from ldlm.diffusion.timesteps import UniformTimesteps
from ldlm.model import LDLM
from ldlm.nn.denoiser import DiT
from ldlm.nn.latent_coders import PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.nn.token_decoders import LinearTokenDecoder

PACKAGE = ROOT / "ldlm"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
# What may be asked whether it is empty; and what may be asked whether it is 0, but has no default behind an `or`.
EMPTY = {"str", "bool", "list", "dict", "tuple", "None"}
ZERO = EMPTY | {"int", "float", "Tensor"}
NOTHING = {"0", "0.0", "''", "[]", "{}", "()"}  # a default that says no more than what it replaces
FUNCTIONS = {"detokenize"}  # PackedTextDataModule takes nothing else, and a function is always true


def optional(annotation: ast.expr | None, plain: set[str]) -> bool:
    """Whether it says `X | None` of an X that is none of what is plain."""
    if not isinstance(annotation, ast.BinOp):
        return False
    sides = {ast.unparse(side).partition("[")[0] for side in (annotation.left, annotation.right)}
    return "None" in sides and not sides <= plain


def given(function: ast.FunctionDef, plain: set[str]) -> set[str]:
    """A function's optional arguments."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return {a.arg for a in arguments if optional(a.annotation, plain)} - FUNCTIONS


def declared(trees: list[ast.Module]) -> dict[int, set[str]]:
    """The attributes that are optional, by name, for each of the two sets above."""
    return {len(plain): _declared(trees, plain) for plain in (EMPTY, ZERO)}


def _declared(trees: list[ast.Module], plain: set[str]) -> set[str]:
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.AnnAssign) and optional(node.annotation, plain):
            found.add(node.target.id if isinstance(node.target, ast.Name) else node.target.attr)
        if isinstance(node, ast.FunctionDef):
            kept = {a.attr for a in ast.walk(node) if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Store)}
            found |= given(node, plain) & kept  # an argument that is kept under its own name
    return found - FUNCTIONS


def questions(node: ast.AST) -> list[ast.expr]:
    """What a node asks whether it is true."""
    match node:
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            return [test]
        case ast.comprehension(ifs=tests):
            return tests
        case ast.BoolOp(values=values):
            return values
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return [operand]
    return []


def asked(tree: ast.Module, attributes: dict[int, set[str]]) -> list[str]:
    """Optional objects that are asked whether they are true, and optional numbers behind which an `or` stands."""
    conditions = {id(question) for node in ast.walk(tree) for question in questions(node)}
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        arguments = {len(plain): given(function, plain) for plain in (EMPTY, ZERO)}
        for node in ast.walk(function):
            value = isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and id(node) not in conditions
            if value and ast.unparse(node.values[-1]) in NOTHING:
                continue
            kind = len(EMPTY if value else ZERO)
            for question in questions(node):
                argument = isinstance(question, ast.Name) and question.id in arguments[kind]
                # a command's options are words and numbers, whatever else has such a name
                attribute = isinstance(question, ast.Attribute) and not ast.unparse(question.value).endswith("options")
                if argument or (attribute and question.attr in attributes[kind]):
                    found.append(f"line {question.lineno}: {ast.unparse(question)} in {ast.unparse(node)}")
    return found


DECLARED = declared([*TREES.values()])


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_nothing_optional_is_asked_whether_it_is_true_where_none_is_meant(path):
    assert asked(TREES[path], DECLARED) == []


@pytest.mark.parametrize(
    "code",
    [
        "def f(part: Part | None): return part or Part()",
        "def f(part: Part | None): return [part or Part(), 1]",
        "def f(count: int | None, n: int): return g(count or n)",
        "def f(self): self.stored: Part | None = None\ndef g(self): return (self.stored or self.other)(1)",
        "def f(part: Part | None): return 1 if part else 2",
        "def f(part: Part | None):\n if not part: pass",
        "def f(part: Part | None):\n while 1 and part: pass",
        "def f(self, part: Part | None = None):\n self.part = part\n return 0 if self.part else 1",
    ],
)
def test_each_way_to_ask_an_object_whether_it_is_true_is_found(code):
    tree = ast.parse(code)
    assert asked(tree, declared([tree]))


def test_a_part_whose_length_is_0_stays_in_the_model():
    def hollow(kind: type) -> type:
        return type(kind.__name__, (kind,), {"__len__": lambda self: 0})

    given = {
        "latent_encoder": hollow(PerceiverResamplerEncoder)(HIDDEN, LATENT, LENGTH, width=16, layers=1, heads=2),
        "latent_decoder": hollow(PerceiverResamplerDecoder)(HIDDEN, LATENT, LENGTH, width=16, layers=1, heads=2),
        "denoiser": hollow(DiT)(LATENT, LENGTH, width=16, layers=1, heads=2),
        "token_decoder": hollow(LinearTokenDecoder)(HIDDEN, VOCAB),
        "schedule": hollow(TangentSchedule)(d=2.0),
        "timesteps": hollow(UniformTimesteps)(),
        "sampler": hollow(DDIM)(),
        "grid": hollow(UniformGrid)(t_min=0.02),
    }
    model = LDLM(hollow(FixedTokenEncoder)(), sequence_length=LENGTH, **given)
    assert all(vars(model)["_modules"].get(name, vars(model).get(name)) is part for name, part in given.items())
    grid = MixedGrid(given["grid"], hollow(UniformGrid)(t_min=0.03))
    assert (grid.first is given["grid"], grid.second.t_min) == (True, 0.03)


def test_a_sampler_and_a_grid_whose_length_is_0_are_used():
    class Note(DDIM):
        calls = 0

        def __len__(self):
            return 0

        def sample(self, *arguments, **named):
            Note.calls += 1
            return super().sample(*arguments, **named)

    class Early(UniformGrid):
        def __len__(self):
            return 0

    model = make_model()
    before = model.sample_tokens(4, nfe=4, sampler=DDIM(), grid=UniformGrid(t_min=0.5))
    after = model.sample_tokens(4, nfe=4, sampler=Note(), grid=Early(t_min=0.5))
    assert Note.calls == 1
    assert torch.equal(before, after)


def test_no_latents_are_not_taken_for_one_a_token():
    for kind in (PerceiverResamplerEncoder, PerceiverResamplerDecoder):
        with pytest.raises(ValueError, match="num_latents=0 must be at least 1"):
            kind(HIDDEN, LATENT, LENGTH, num_latents=0, width=16, layers=1, heads=2)
