from ensemble.api import load_ensemble as load_ensemble
from ensemble.api import read_case as read_case
from ensemble.api import segment as segment
from ensemble.errors import InputRefused as InputRefused
from ensemble.errors import MembersFailed as MembersFailed
from ensemble.errors import OutOfMemory as OutOfMemory
from ensemble.errors import UsageError as UsageError
from ensemble.errors import UserError as UserError
from ensemble.errors import WeightsBroken as WeightsBroken
from ensemble.geometry import Grid as Grid
from ensemble.pipeline import Ensemble as Ensemble
from ensemble.pipeline import Result as Result
from ensemble.readers.base import RawCase as RawCase
from ensemble.types import Modality as Modality
from ensemble.volume import Volume as Volume

__version__: str
