"""The golden merges, as commands: each writes the same bytes, whatever changes in the code."""

from __future__ import annotations

__all__ = ["APPROXIMATE", "EXACT", "RECIPES"]


def store(method: str, models: str, export: str = "") -> str:
    """A store that grows by ``method`` over ``models``, and its export."""
    return (
        f"continual init store {method} --base base; continual add store --allow-different-bases {models}; "
        f"continual export store {export} -o out"
    )


RECIPES = {
    "places": """
        models: [one, two]
        base: base
        method: task_arithmetic
        parameters:
          weights: [{up_proj: 0.5, "*": 1.0}, {"model.layers.0.*": 0.25, "*": 0.75}]
          scale: {lm_head: 0.0, "*": 0.5:1.0}
    """,
    "adapter-places": """
        models: [a, b, c]
        method: task_arithmetic
        parameters: {weights: [{q_proj: -1.0, "*": 2.0}, 0.5, 1.0], scale: 0.25}
        dtype: bfloat16
    """,
    "ties-places": """
        models: [one, two, three]
        base: base
        method: ties
        parameters: {scope: tensor, density: {mlp: 0.25, "*": 0.5}}
        exclude: ["*norm*"]
    """,
}
"""Recipes, by the names of their files."""

EXACT = {
    # full checkpoints, entry by entry
    "linear": "-m linear one two -o out",
    "linear, weighted": "-m linear --weights 2,1,1 one two three -o out",
    "linear, not normalized": "-m linear --no-normalize --weights 2,-1 one two -o out",
    "linear of shards": "-m linear one-sharded two-sharded --shard-size 1000 -o out",
    "linear of files": "-m linear one.safetensors two.safetensors -o out.safetensors",
    "task arithmetic": "-m task_arithmetic --scale 0.5 --base base one two three -o out",
    "task arithmetic, analogy": "-m task_arithmetic --weights 1,1,-1 --base base one two three -o out",
    "task arithmetic, graded": "-m task_arithmetic --scale 0:1 --base base one two-sharded -o out",
    "task arithmetic by places": "run places.yaml -o out",
    "task arithmetic, excluded": "-m task_arithmetic --base base one two --exclude embed --exclude *norm* -o out",
    "task arithmetic in half": "-m task_arithmetic --base base-half one-half two-half --scale 0.5 -o out",
    "to another dtype": "-m task_arithmetic --base base one two --dtype float16 -o out",
    "kept where missing": "-m task_arithmetic --base base one fewer --on-mismatch base -o out",
    "rows of a vocabulary": "-m linear one longer --vocabulary largest -o out",
    "dequantized": "-m linear fp8 one --dequantize --dtype float32 -o out",
    "passthrough": "-m passthrough --scale 0.5 one -o out",
    "ties": "-m ties --density 0.5 --base base one two -o out",
    "ties of one tensor": "-m ties --scope tensor --density 0.25:0.5 --base base one two three four -o out",
    "ties as a sum": "-m ties --density 0.5 --vote weighted --no-normalize --weights 1,0.5 --base base one two -o out",
    "ties towards plus": "-m ties --density 0.5 --zero plus --base base one two -o out",
    "ties by places": "run ties-places.yaml -o out",
    "magmax": "-m magmax --base base one two three -o out",
    "consensus": "-m consensus --threshold 0.5 --base base one two three -o out",
    "ram": "-m ram --epsilon 0.2 --no-relative --base base one two three four -o out",
    "ramplus_tl": "-m ramplus_tl --epsilon 0.2 --no-relative --base base one two -o out",
    "nearswap": "-m nearswap --t 0.25 --base base one -o out",
    "breadcrumbs": "-m breadcrumbs --density 0.5 --gamma 0.125 --base base one two -o out",
    "dare": "-m dare --drop 0.5 --seed 7 --base base one two -o out",
    "dare and ties": "-m dare+ties --drop 0.5 --density 0.5 --base base one two -o out",
    "mergekit's dare_ties": "-m dare_ties --drop 0.5 --base base one two -o out",
    "lines": "-m lines --alpha 0.5 --beta 0.5 --published --base base one two -o out",
    "lines around ties": "-m lines+ties --alpha 0.5 --beta 0.5 --published --density 0.5 --base base one two -o out",
    # parts of pipelines
    "a pipeline": "-m linear pipeline pipeline2 -o out",
    "a component": "-m linear pipeline pipeline2 --component unet -o out",
    # adapters, as factors
    "adapters": "-m linear a b -o out",
    "adapters, analogy": "-m task_arithmetic --weights 1,2,-0.5 a b c -o out",
    "adapters by places": "run adapter-places.yaml -o out",
    "adapters with patterns": "-m task_arithmetic --weights 0.5,0.25 a patterns -o out",
    "adapters with lines": "-m lines --alpha 0.5 --beta 0.5 --published a c -o out",
    "adapters with a head": "-m task_arithmetic a head --base base -o out",
    "adapters with tokens": "-m task_arithmetic b tokens --base base -o out",
    "an adapter's alpha": "-m task_arithmetic a b --lora-alpha 8 -o out",
    "a bare adapter": "-m task_arithmetic a/adapter_model.safetensors --lora-alpha 4 -o out.safetensors",
    "kohya": "-m task_arithmetic --weights 0.5,0.25 k1.safetensors k2.safetensors -o out.safetensors",
    "kohya to diffusers": "-m linear k1.safetensors k2.safetensors --format diffusers --base pipeline -o out",
    "diffusers to kohya": "-m passthrough d.safetensors --format kohya --base pipeline -o out.safetensors",
    "kohya with diffusers": "-m task_arithmetic k1.safetensors d.safetensors --base pipeline --format diffusers -o out",
    # adapters, into their base
    "baked": "-m task_arithmetic --weights 0.5,0.25,1 a b c --as model --base base -o out",
    "baked with tokens": "-m task_arithmetic tokens head --as model --base base-half -o out",
    "baked by ties": "-m ties --density 0.5 a b --as model --base base -o out",
    "baked by magmax": "-m magmax a patterns --as model --base base --shard-size 2000 -o out",
    "kohya into a pipeline": "-m task_arithmetic k1.safetensors d.safetensors --as model --base pipeline -o out",
    # packs and stores
    "a pack": "compress a -o pack.safetensors",
    "a pack, merged": "compress a -o pack.safetensors; -m task_arithmetic pack.safetensors b -o out",
    "a pack, unpacked": "compress b -o pack.safetensors --coding bitmap; decompress pack.safetensors -o out",
    "a store of sums": store("-m task_arithmetic --scale 0.5", "one two three"),
    "a store of means": store("-m linear", "one-sharded two"),
    "a store by ties": store("-m ties --density 0.5", "one two"),
    "a store of adapters": store("-m task_arithmetic", "a c", "--as adapter"),
}
"""Merges in which nothing is rounded, or only by single operations that every processor rounds alike."""

APPROXIMATE = {
    "sce": "-m sce --density 1 --select deltas --base base one two three -o out",
    "varm": "-m varm --base base one two -o out",
    "pcb": "-m pcb --ratio 0.5 --base base one two -o out",
    "slerp": "-m slerp --t 0.25 one two -o out",
    "nuslerp": "-m nuslerp --weights 1,3 one two -o out",
    "multislerp": "-m multislerp one two three -o out",
    "karcher": "-m karcher one two three -o out",
    "model_stock": "-m model_stock --base base one two three -o out",
    "arcee_fusion": "-m arcee_fusion one two -o out",
    "tsv": "-m tsv --base base one two -o out",
    "iso_c": "-m iso_c --base base one two -o out",
    "iso_cts": "-m iso_cts --common 0.5 --base base one two -o out",
    "wudi": "-m wudi --base base one two -o out",
    "svd": "-m svd --energy 0.8 --base base one two -o out",
    "opcm": "-m opcm --base base one two three -o out",
    "della": "-m della --density 0.5 --base base one two -o out",
    "decouple": "-m decouple --base base one two -o out",
    "knots and ties": "-m knots+ties --density 0.5 --base base one two -o out",
    "lines with its own alpha": "-m lines --beta 0.5 --base base one two three -o out",
    "adapters by opcm, baked": "-m opcm a c --as model --base base -o out",
    "adapters by do, baked": "-m do --steps 10 a patterns --as model --base base -o out",
    "adapters orthogonalized, baked": "-m orthogonalize --steps 10 a patterns --as model --base base -o out",
    "adapters by core and tsv, baked": "-m core+tsv a patterns --as model --base base -o out",
    "a store by opcm": store("", "one two three"),
}
"""Merges with roots, angles, exponentials or decompositions: close on every processor, equal only on one."""
