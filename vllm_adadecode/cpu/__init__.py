"""Model Runner V2 on a machine without a GPU, and without Triton.

vLLM's Model Runner V2 writes its bookkeeping as Triton kernels. This package holds a *replacement*
of each such kernel in NumPy and torch, one file for each vLLM module that it serves:

==================== =============================================================================
``registry``         the table of replacements
``memory``           views on the memory that kernels are handed
``tokens``           helpers on bit masks and token sequences
``input_batch``      inputs of a step, bookkeeping after it
``buffer_utils``     staged writes into request state
``block_table``      paged KV cache: tables, slots
``penalties``        repetition, frequency and presence penalties
``constraints``      min-p, logit bias, allowed and stop tokens, bad words, grammars
``thinking_budget``  an end forced on long reasoning
``gumbel``           temperature, sampling
``outputs``          log-probabilities, ranks, masks
``rejection``        verification of drafts
==================== =============================================================================

``support`` says for which configurations vLLM may choose that runner on a CPU, and ``install`` puts
the replacements in place in the worker process. What is changed in vLLM to that end stands in
``vllm_adadecode/vllm_patches/cpu_runner.py``.

This module imports nothing, so that the plugin's entry point can import it in any process.
"""
