"""Placeholder until the CPU form lands."""


def switch_experts(x_TD, ids_TK, weights_TK, gate_up_E2FD, down_EDF):
    """Stand-in."""
    from glm_jax.layers.experts import dense_experts

    return dense_experts(x_TD, ids_TK, weights_TK, gate_up_E2FD=gate_up_E2FD, down_EDF=down_EDF)
