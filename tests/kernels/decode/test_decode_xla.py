from .decode_suite import DecodeSuite


class TestXla(DecodeSuite):
    implementation = "xla"
    dtypes = ("float32", "bfloat16", "float16")
