"""torchlm: jaxlm in PyTorch. To learn porting, read PORTING.md, and `diff jaxlm/model.py torchlm/model.py`.

Files of the same name hold the same classes and functions in the same order. What knows no framework is jaxlm's:
settings, data, scores, the run folder. The names of parameters are jaxlm's words (jaxlm/params/names.py has the rules).

Array names end in their shape, in the letters of jaxlm/__init__.py.
"""
