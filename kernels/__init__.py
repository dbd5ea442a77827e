"""Device kernels of the method, installed as ``vllm_adadecode.kernels``."""

if __name__ == "kernels":
    # Hugging Face publishes a package of that name: never shadow it from a checkout.
    raise ImportError("this folder is installed as vllm_adadecode.kernels, not as kernels")
