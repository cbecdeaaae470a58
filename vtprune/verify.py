from dataclasses import dataclass
@dataclass
class VerifyReport: pass
def verify(*a): pass
