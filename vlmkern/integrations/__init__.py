"""vlmkern inside other libraries; each module imports the library it is named after, and only when it is used."""
