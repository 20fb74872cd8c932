"""Pooling as the one operation that OpenVINO has for it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["fuse_pooling"]


def fuse_pooling(model: Any) -> int:
    """Make each weighted sum of a table's rows one operation of `model`, which is changed; return how many.

    The graphs gather the rows of the atlas that a cell is the sum of, and multiply them with their weights
    (`AtlasPool` of `export/static.py`): operations that every backend has, between which all rows of all
    objects lie in memory. `EmbeddingBagPackedSum` adds each row where it reads it.

    Args:
        model: an `openvino.Model` of fixed sizes.
    """
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    return sum(_fuse(product) for product in products)


def _fuse(product: Any) -> bool:
    """Replace `product`, (N, 1, K) by (N, K, C), if the latter is N * K rows of a table (P, C)."""
    from openvino import opset8

    weights, rows = product.input_value(0), product.input_value(1)
    if rows.get_node().get_type_name() != "Reshape":
        return False
    gather = rows.get_node().input_value(0).get_node()
    if gather.get_type_name() != "Gather":
        return False
    table, indices, axis = (gather.input_value(place) for place in range(3))
    cells, *sizes = rows.get_shape()
    is_sum_of_rows = (
        len(sizes) == 2
        and list(weights.get_shape()) == [cells, 1, sizes[0]]
        and not any(product.get_attributes().values())  # nothing is transposed
        and list(indices.get_shape()) == [cells * sizes[0]]
        and len(table.get_shape()) == 2
        and axis.get_node().get_type_name() == "Constant"
        and not np.any(axis.get_node().get_data())
    )
    if is_sum_of_rows:
        bags = (opset8.reshape(given, np.array([cells, sizes[0]]), False) for given in (indices, weights))
        pooled = opset8.embedding_bag_packed_sum(table, *bags)
        product.output(0).replace(opset8.reshape(pooled, np.array([cells, 1, sizes[1]]), False).output(0))
    return is_sum_of_rows
