"""What is raised and said when a backend cannot run."""


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run here, or has no kernel for this call."""


class BackendFallbackWarning(RuntimeWarning):
    """A faster backend should have been there and was not; results are right, but slower."""
