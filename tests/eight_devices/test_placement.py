"""The layer by itself on a mesh: the numbers of one device, kernels wherever they can run, and a word if not."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import assert_close
from venom_jax import Method, Recipe, SparseMLP, dispatch, sparse_ffn

D, F = 64, 512
AXES = ("data", "fsdp")
ACT24, VENOM = Recipe.act24(token_blocks=8), Recipe.venom(4, 1, token_blocks=8)


def mesh_of(kind=AxisType.Auto, shape=(2, 4)):
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 2)


def inputs(dtype=jnp.float32, d_model=D):
    return jax.random.normal(jax.random.key(1), (16, 8, d_model), dtype)


def split(**options):
    return nnx.split(SparseMLP(D, F, max_experts=4, rngs=nnx.Rngs(0), **options), nnx.Param, Method)


def gradients(graph, recipe, **options):
    """(loss, stats, gradients of parameters and tokens), jitted."""

    def loss(params, x, method):
        y, stats = nnx.merge(graph, params, method)(x, recipe=recipe, return_stats=True, **options)
        return jnp.sin(y).sum(), stats

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def spread(mesh, tree, *specs):
    """w1 as the first spec says, w2 as the second; everything else whole."""
    place = {(D, F): specs[0], (F, D): specs[1]} if specs else {}
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, place.get(leaf.shape, P()))), tree)


BY_D, BY_NEURONS, BOTH = (P("fsdp"), P(None, "fsdp")), (P(None, "fsdp"), P("fsdp")), (P("fsdp", "data"), P("data"))
CASES = {
    "auto, ambient": (AxisType.Auto, True, VENOM, BY_D, {}),
    "auto, the types name the mesh, neurons cut": (AxisType.Auto, False, ACT24, BY_D, {"weight_axes": ("fsdp",)}),
    "auto, metadata": (AxisType.Auto, True, VENOM, BY_NEURONS, {"w1_metadata": {"out_sharding": (None, "fsdp")}}),
    "explicit, dense": (AxisType.Explicit, True, Recipe.dense(), BY_D, {}),
    "explicit, ambient": (AxisType.Explicit, True, ACT24, BY_NEURONS, {}),
    "explicit, the types name the mesh, over two axes": (AxisType.Explicit, False, VENOM, BOTH, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_changes_no_number(name):
    kind, ambient, recipe, specs, options = CASES[name]
    mesh = mesh_of(kind)
    _, params, method = split()
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        graph = split(**options)[0]
        run = gradients(graph, recipe)
        x = jax.device_put(inputs(), NamedSharding(mesh, P(AXES)))
        found = run(spread(mesh, params, *specs), x, spread(mesh, method))
    expected = gradients(split()[0], recipe)(params, inputs(), method)
    for out, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(out, reference)
    if kind == AxisType.Explicit:
        assert found[1][0]["w1"].get_value().sharding.spec == P(*specs[0], *[None] * (2 - len(specs[0])))


def test_an_output_lies_where_it_is_wanted():
    mesh = mesh_of()
    graph, params, method = split()
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: nnx.merge(graph, params, method)(x, recipe=ACT24, out_sharding=P("data")))
        assert run(jax.device_put(inputs(), NamedSharding(mesh, P(AXES)))).sharding.spec == P("data")


@pytest.mark.parametrize("checked", [False, True])
def test_inside_a_users_own_shard_map(checked):
    """What is local counts, over whichever axes the user has taken."""
    mesh = mesh_of()
    graph, params, method = split()
    whole = gradients(graph, ACT24)(params, inputs(), method)
    own = Recipe.act24()  # in fours of a device's tokens

    def loss(params, x):
        y = nnx.merge(graph, params, method)(x, recipe=own)
        return jax.lax.psum(jnp.sin(y).sum(), AXES)

    each = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P(AXES)), out_specs=P(), check_vma=checked)
    value, found = jax.jit(jax.value_and_grad(each, (0, 1)))(params, inputs())
    assert_close(value, whole[0][0])
    for out, reference in zip(jax.tree.leaves(found), jax.tree.leaves(whole[1]), strict=True):
        assert_close(out, reference)


def test_inside_a_shard_map_over_some_axes():
    mesh = mesh_of()
    graph, params, method = split()
    half = Recipe.act24(token_blocks=4)
    each = jax.shard_map(
        lambda x: nnx.merge(graph, params, method)(x, recipe=half),
        mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False,
    )  # fmt: skip
    assert_close(jax.jit(each)(inputs()), nnx.merge(graph, params, method)(inputs(), recipe=ACT24))


def test_what_an_axis_does_not_divide_is_repeated():
    """An initialisation with one row, a batch of six, and 36 neurons on eight devices."""
    mesh = mesh_of()
    mlp = SparseMLP(D, 36, weight_axes=AXES, rngs=nnx.Rngs(0))
    recipe = Recipe.act24(wgrad="dense")
    for rows in (1, 6, 0):
        x = inputs()[:rows]
        expected = mlp(x, recipe=recipe)
        with jax.set_mesh(mesh):
            assert_close(jax.jit(functools.partial(mlp, recipe=recipe))(x), expected)
    with pytest.raises(ValueError, match=r"blocks of the batch do not divide among 2 parts"), jax.set_mesh(mesh):
        mlp(inputs()[:6], recipe=Recipe.act24(token_blocks=3))
    with pytest.raises(ValueError, match=r"token_spec = .* names the axis 'rows'; the mesh has data, fsdp"):
        SparseMLP(D, F, mesh=mesh, token_spec=P("rows"), rngs=nnx.Rngs(0))(inputs(), recipe=ACT24)


def kernels_in(function, *arguments):
    """How many of our kernels the program for a GPU of compute capability 9.0 holds, in each device's part."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@mosaic_gpu_v2")


@pytest.fixture
def hopper(monkeypatch):
    """A stand-in: programs are lowered for a GPU that is not there, and not run."""
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    dispatch.warn_reference.cache_clear()
    yield
    dispatch.warn_reference.cache_clear()


def of_weights(w1, w2, x, **options):
    return sparse_ffn(x, w1, w2, recipe=Recipe.act24(), **options)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("said", ["ambient", "given", "by the types", "shard_map"])
def test_kernels_run_under_any_mesh(hopper, kind, said):
    mesh = mesh_of(kind)
    place = functools.partial(NamedSharding, mesh)
    shapes = (((128, 512), P(None, "fsdp")), ((512, 128), P("fsdp")), ((2048, 128), P(AXES)))
    bf16 = jnp.bfloat16
    arrays = [jax.ShapeDtypeStruct(s, bf16, sharding=None if said == "given" else place(p)) for s, p in shapes]
    options = {"mesh": mesh} if said == "given" and kind == AxisType.Auto else {}
    function = functools.partial(of_weights, **options)
    if said == "shard_map":
        specs = (P(), P(), P(AXES))
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(AXES), check_vma=False)
        arrays = [jax.ShapeDtypeStruct(s.shape, bf16, sharding=place(p)) for s, p in zip(arrays, specs, strict=True)]
    elif said == "given" and kind == AxisType.Explicit:
        pytest.skip("arrays on an explicit mesh name it themselves")
    with warnings.catch_warnings(), jax.set_mesh(mesh) if said == "ambient" else contextlib.nullcontext():
        warnings.simplefilter("error")
        assert kernels_in(function, *arrays) >= 2


def test_a_gpu_that_runs_the_reference_says_so_once(hopper):
    w1, w2, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 512), (512, 128), (2048, 128)))
    with pytest.warns(dispatch.ReferenceWarning, match=r"nothing says how .* jax.set_mesh\(mesh\)") as told:
        assert kernels_in(of_weights, w1, w2, x) == 0
    assert told[0].filename == __file__, "where the caller stands"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_in(lambda *arrays: of_weights(*arrays), w1, w2, x) == 0
    with pytest.warns(dispatch.ReferenceWarning, match="tokens are float32, the kernels take bfloat16"):
        kernels_in(of_weights, w1, w2, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    odd = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 96), (96, 128))]
    with pytest.warns(dispatch.ReferenceWarning, match="must be multiples of 64"):
        kernels_in(of_weights, *odd, x)
    checked = jax.shard_map(of_weights, mesh=mesh_of(), in_specs=(P(), P(), P(AXES)), out_specs=P(AXES))
    with pytest.warns(dispatch.ReferenceWarning, match="give it check_vma=False"):
        assert kernels_in(checked, w1, w2, x) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels_in(lambda *arrays: sparse_ffn(arrays[2], *arrays[:2], recipe=Recipe.dense()), w1, w2, x)


def test_an_array_on_one_of_several_devices_needs_no_mesh(hopper):
    found = []
    own = functools.partial(dispatch.choose_kernels, None, Recipe.act24(), 128, 512, jnp.bfloat16)
    jax.eval_shape(jax.shard_map(lambda x: (found.append(own()), x)[1], mesh=mesh_of(shape=(1, 1)), in_specs=P(),
                                 out_specs=P(), check_vma=False), np.ones(2))  # fmt: skip
    assert found == ["hopper"]
    with pytest.warns(dispatch.ReferenceWarning):
        assert own() is None
