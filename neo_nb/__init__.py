__version__ = "0.1.0"


def __getattr__(name: str):
    "`from neo_nb import load_detector`, imported when it is asked for: the command line must not wait for torch."
    if name == "load_detector":
        from neo_nb.deploy.detector import load_detector

        return load_detector
    raise AttributeError(f"module 'neo_nb' has no attribute {name!r}")
