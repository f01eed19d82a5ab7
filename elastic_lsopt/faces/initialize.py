def initialize(**kw):
    raise NotImplementedError
