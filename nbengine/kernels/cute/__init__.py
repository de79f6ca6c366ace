"""Ops in CuTe DSL (the extra `cute`): what `Op.alternatives` names, imported when asked for."""
