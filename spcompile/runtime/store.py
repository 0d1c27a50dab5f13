"""The weights of a model: which are on the device, and which are streamed from host memory.

A model comes in one of three ways, which differ in what its tensors look at (see ``weights.py`` for what a weight is):

* *offloaded*: they look at what is `StoredWeight.current` - the device copy of a resident weight, otherwise its home,
  which the device reads in place. So no code can read a stale or freed weight.
* *on the device already*: the same, but a weight has no home, and its device "copy" is the storage it came with, until
  a plan streams it.
* *re-homed*: the model stays a CPU model, its tensors look at host memory always, and device copies are only copies,
  which are renewed when the weight has changed.

A model of the first two kinds whose weights an optimizer on the host updates (`master_on_host`) looks at the homes
always, as a re-homed one does; device copies are only copies then, too.

Who holds whom: tensor -> `Tag` -> `PageStore` -> `StoredWeight` -> block. The store holds the model's tensors and the
runtimes of its graphs only weakly, so there is no cycle and no registry: the last tensor to die takes everything along.

Copies of a weight on the device are known by `PageStore.version`. Edits in place move the version counters of the
tensors; fused optimizers do not, so a hook behind every optimizer step (``optimizers.py``) bumps the ``generation`` of
the stores that it touched. Edits through ``.data`` leave no trace at all: ``spcompile.refresh`` is for those.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from spcompile.errors import OffloadError
from spcompile.ir import Page, Plan, Weight
from spcompile.lanes import Recording
from spcompile.progress import Advance, progress
from spcompile.runtime.arena import Arena
from spcompile.runtime.gradients import GradientMemory
from spcompile.runtime.host import HostBlock, lay_out_blocks
from spcompile.runtime.hosted import HostParameters
from spcompile.runtime.recording import Recorder
from spcompile.runtime.streams import CudaStreams, EmulatedStreams, Streams
from spcompile.runtime.weights import (
    TAG,
    StoredWeight,
    Tag,
    WeightView,
    bytes_of,
    look_at,
    real_tensors,
    storage_key,
    tag_of,
    tag_on,
    untag,
    version_of,
)

logger = logging.getLogger(__name__)


Method = TypeVar("Method", bound=Callable[..., Any])


def _locked(method: Method) -> Method:
    """A method of the page store that waits until no iteration is issued."""

    @functools.wraps(method)
    def call(self: PageStore, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast("Method", call)


class PageStore:
    """The weights of one model, and what the graphs compiled for it share: pages, arena, compiled segments.

    Args:
        device: the compute device; ``cpu`` is the emulated one.
        rehomed: whether the model's tensors stay in host memory as CPU tensors.
        takes_in: whether the backend made it for a model as it came, and makes one for each other such model.

    Attributes:
        weights: by name, in the order of the model's parameters.
        generation: goes up when copies may be stale although no tensor's version says so.
        moves: goes up when weights move.
        pages: pages of all graphs so far; a weight never changes its page.
        arena: where streamed pages have their slots.
        gradients: host memory for what backward sends down.
        hosted: parameters on the host over these weights.
        copies_follow: whether the homes are what counts, and device copies of weights only follow them.
        knows_of_state: whether the user was told that an optimizer keeps its state on the device.
        segments: compiled segments by key.
        lock: held while an iteration is issued or weights are moved: two threads take turns.
        latest: the runtime of the graph that ran last, and what its pages were bound to (see ``transfers.py``).
        views: where copies follow, how graphs and their callers see the weights: the memory, and a tensor over it. Kept
            here and not there, as they belong to compiled code, which may outlive the model.
        log: events of the runtimes, where a test has put a list.
        recorder: what the runtimes tell what happens when, while somebody records.
        recordings: what the last one recorded.
    """

    def __init__(self, device: torch.device, *, rehomed: bool = False, takes_in: bool = False) -> None:
        self.device = device
        self.rehomed = rehomed
        self.takes_in = takes_in
        self.weights: dict[str, StoredWeight] = {}
        self.generation = 0
        self.moves = 0
        self.pages: list[Page] = []
        self._other_pages: list[Page] = []
        """Of weights that are in another page, too: a graph was called for a layer that shares some with another one.
        No plan names them, so each has a number, which no plan's page has."""
        streams: Streams = CudaStreams(device) if device.type == "cuda" else EmulatedStreams()
        self.arena = Arena(device, streams)
        self.gradients = GradientMemory(device)
        self.hosted = HostParameters()
        self.copies_follow = rehomed
        self.knows_of_state = False
        self.segments: dict[str, torch.nn.Module] = {}
        self.lock = threading.RLock()
        self.latest: tuple[weakref.ref[Any], tuple[tuple[int, str], ...]] | None = None
        self.views: WeakKeyDictionary[Any, dict[tuple[int, str], tuple[Tensor, Tensor]]] = WeakKeyDictionary()
        self.log: list[tuple[object, ...]] | None = None
        self.recorder: Recorder | None = None
        self.recordings: list[Recording] = []
        self._tensors: dict[str, list[TensorWeakRef]] = {}
        self._runtimes: list[weakref.ref[Any]] = []
        self._pieces: dict[str, tuple[tuple[int, Tensor], ...]] = {}
        self._addresses: dict[int, str] = {}
        self._copied: dict[str, Hashable] = {}  # where copies follow: the version of each device copy

    @property
    def has_cpu_parameters(self) -> bool:
        """Whether the model's parameters are those of a CPU model as it came, on whatever device it computes. (The
        parameters of one that was offloaded to the emulated device stand for a GPU's.)"""
        return self.rehomed or (self.takes_in and self.device.type == "cpu")

    # What looks at a weight.

    @_locked
    def add(self, weight: StoredWeight, tensors: Iterable[Tensor]) -> None:
        """Take a weight in and let these tensors look at it, whatever they looked at before.

        Args:
            tensors: all that viewed the original storage; each keeps its dtype, shape, stride and storage offset.
        """
        assert weight.name not in self.weights, weight.name
        self.weights[weight.name] = weight
        self._tensors[weight.name] = []
        with real_tensors():
            for tensor in tensors:
                if not self._views(tensor, weight):
                    look_at(tensor, self._face(weight))
                self.attach(tensor, weight.name)

    def take(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Take a weight in as it is, where it is: nothing is moved or copied.

        Args:
            name: free in this store.
            tensors: all that view one storage, which is on the device, or (`rehomed`) in host memory.
        """
        with real_tensors():
            memory = bytes_of(tensors[0])
        where = {"origin": memory} if self.rehomed else {"resident": memory}
        self.add(StoredWeight(name, memory.numel(), **where), tensors)

    def attach(self, tensor: Tensor, name: str) -> None:
        """Tag a tensor that already looks at the weight's memory, so that it follows the weight from now on."""
        if any(tensor is each for each in self.tensors_of(name)):
            return
        setattr(tensor, TAG, Tag(self, name))
        self._tensors[name].append(TensorWeakRef(tensor))

    @_locked
    def adopt(self, other: PageStore, name: str, new_name: str) -> None:
        """Take over a weight of another store of the same kind, under a name that is free here. Nothing is copied."""
        assert (other.device, other.rehomed) == (self.device, self.rehomed)
        weight, tensors = other.weights[name], other.tensors_of(name)
        other._forget(name)
        weight.name = new_name
        self.add(weight, tensors)

    @_locked
    def release(self, name: str, device: torch.device) -> None:
        """Make the weight an ordinary storage on ``device`` for all its tensors, and forget it."""
        weight = self.weights[name]
        self.settle()
        with real_tensors():
            memory = self._ordinary_memory(weight, device)
            for tensor in self.tensors_of(name):
                if self._views(tensor, weight):
                    look_at(tensor, memory)
        self._forget(name)

    def _ordinary_memory(self, weight: StoredWeight, device: torch.device) -> Tensor:
        """The weight's bytes in memory of their own on ``device``: what it looks at now, where that is such memory."""
        face = self._face(weight)
        is_home = weight.has_home and face is not weight.resident
        if face.device == device and not is_home:
            return face
        source = weight.host if is_home else face
        return torch.empty(weight.nbytes, dtype=torch.uint8, device=device).copy_(source)

    def free_name(self, name: str) -> str:
        """The name, or one made of it, that no weight has yet."""
        return _free_name(name, self.weights)

    def _forget(self, name: str) -> None:
        for tensor in self.tensors_of(name):
            untag(tensor)
        del self.weights[name], self._tensors[name]
        self._moved()

    def tensors_of(self, name: str) -> list[Tensor]:
        """The live tensors that were given to this weight (some may look elsewhere by now: see `holds`)."""
        return [tensor for each in self._tensors.get(name, ()) if (tensor := each()) is not None]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is tagged for this store and its data really lies in the store's memory.

        ``model.half()`` and ``param.data = other`` leave the tag on tensors that look elsewhere.
        """
        tag = tag_on(tensor)
        if tag is None or tag.store is not self or tag.name not in self.weights:
            return False
        return self._views(tensor, self.weights[tag.name])

    def weight_of(self, tensor: Tensor, path: str = "") -> Weight | None:  # noqa: ARG002  # signature of its callers
        """The weight that a tensor looks at, or None."""
        tag = tag_of(tensor)
        if tag is None or tag.store is not self:
            return None
        return Weight(tag.name, self.weights[tag.name].nbytes)

    def model_weights(self) -> list[Weight]:
        """All weights, in the order of the model's parameters, which is their order in host memory."""
        return [Weight(weight.name, weight.nbytes) for weight in self.weights.values()]

    def _face(self, weight: StoredWeight) -> Tensor:
        """The memory that the model's tensors look at."""
        if self.rehomed:
            return weight.host
        return weight.view if self.copies_follow and weight.has_home else weight.current

    def _views(self, tensor: Tensor, weight: StoredWeight) -> bool:
        # By storage, not by address: those of empty tensors are all null.
        return storage_key(tensor) == storage_key(self._face(weight))

    # Where a weight is.

    def data_ptr(self, name: str) -> int:
        """Address of the weight's current memory; 0 once it was released."""
        return self.weights[name].current.data_ptr() if name in self.weights else 0

    def name_at(self, tensor: Tensor) -> str | None:
        """The weight in whose current memory a tensor lies, as the compute device sees it; None where there is none."""
        if not self._addresses:
            placed = (weight for weight in self.weights.values() if weight.resident is not None or weight.has_home)
            self._addresses = {weight.current.data_ptr(): weight.name for weight in placed if weight.nbytes}
        return self._addresses.get(tensor.untyped_storage().data_ptr())

    def page_of(self, weights: tuple[Weight, ...]) -> Page | None:
        """A page of just these weights for another graph's layers; None where they cannot be streamed.

        Those that came on the device and have not been placed by any plan are moved to host memory now.
        """
        stored = [self.weights[weight.name] for weight in weights]
        if [each.nbytes for each in stored] != [weight.nbytes for weight in weights]:
            return None
        if any(each.resident is not None and each.has_home for each in stored):
            return None  # resident, by another graph's plan: best used where they are
        self.make_offloaded(weight.name for weight in weights)
        known = next((page for page in self._all_pages() if page.weights == weights), None)
        if known is not None:
            return known
        paged = {weight.name for page in self.pages for weight in page.weights}
        kept = self._other_pages if any(weight.name in paged for weight in weights) else self.pages
        paths = [weight.name.split(".") for weight in weights]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        name = ".".join(parts[0] for parts in shared) or weights[0].name
        taken = {page.name for page in self._all_pages()} | ({name} if kept is self._other_pages else set())
        kept.append(Page(_free_name(name, taken), weights))
        return kept[-1]

    def _all_pages(self) -> list[Page]:
        return [*self.pages, *self._other_pages]

    def page_like(self, page: Page, names: Mapping[str, str]) -> Page | None:
        """The page that has these weights where another one has its own; see `page_of`.

        Args:
            page: the other one.
            names: for its weights, those in their places. A backward graph may not see all of them: the page is then
                one that the forward graph has found.
        """
        for each in self._all_pages():
            same_sizes = [weight.nbytes for weight in each.weights] == [weight.nbytes for weight in page.weights]
            pairs = zip(page.weights, each.weights, strict=False)
            if same_sizes and all(names.get(own.name, other.name) == other.name for own, other in pairs):
                return self.page_of(each.weights)
        return self.page_of(tuple(Weight(names.get(own.name, own.name), own.nbytes) for own in page.weights))

    def _moved(self) -> None:
        """A weight has other memory now."""
        self.moves += 1
        self._pieces.clear()
        self._addresses.clear()

    @_locked
    def make_resident(self, names: Iterable[str]) -> None:
        """Give these weights device copies, which the device uses from now on.

        Raises:
            OffloadError: the device has not this much memory; nothing has changed then.
        """
        moving = [self.weights[name] for name in dict.fromkeys(names) if self.weights[name].resident is None]
        if not moving:
            return
        self.settle()
        with real_tensors():
            copies = [self._device_copy(weight, moving) for weight in moving]
            for weight, copy in zip(moving, copies, strict=True):
                self._copied[weight.name] = self.version([weight.name])
                self._point(weight, copy)
        self.settle()

    @_locked
    def make_offloaded(self, names: Iterable[str]) -> None:
        """Give these weights homes, and their device memory back; the device reads the homes from now on.

        Raises:
            OffloadError: there is not enough host memory; what has not moved yet stays where it is.
        """
        wanted = set(names)
        moving = [weight for name, weight in self.weights.items() if name in wanted]  # homes lie in the model's order
        moving = [weight for weight in moving if weight.resident is not None or not weight.has_home]
        if not moving:
            return
        self.settle()
        with real_tensors():
            # Even where no version says that the copy was edited: what was edited through .data would be lost.
            stale = [weight for weight in moving if weight.has_home and not self.copies_follow]
            for weight in stale:
                assert weight.resident is not None
                weight.host.copy_(weight.resident)
            self._make_homes([weight for weight in moving if not weight.has_home])
            self.settle()
            left = [(weight.name, weight.resident) for weight in moving if weight.resident is not None]
            for weight in moving:
                self._point(weight, None)
        self._forget_views()
        unchanged = [name for name, version in self._copied.items() if version == self.version([name])]
        self.touch()  # a slot may hold the weight as it was before it was resident
        self._copied.update((name, self.version([name])) for name in unchanged)  # copies beside it are what they were
        _report_held(left)

    def _forget_views(self) -> None:
        """Of memory in which a weight is no more: they would keep it."""
        for views in self.views.values():
            for key, (memory, _) in list(views.items()):
                weight = self.weights.get(key[1])
                if weight is None or memory is not weight.current:
                    del views[key]

    def _make_homes(self, weights: Sequence[StoredWeight]) -> None:
        """Copy weights that have no home yet into blocks."""
        sizes_bytes = [weight.nbytes for weight in weights]
        with progress("moving weights to host memory", sum(sizes_bytes), "B") as advance:
            for places in lay_out_blocks(sizes_bytes):
                self._fill_block([(weights[index], offset_bytes) for index, offset_bytes in places], advance)

    def _fill_block(self, moving: Sequence[tuple[StoredWeight, int]], advance: Advance) -> None:
        pieces = [(offset_bytes, self._face(weight)) for weight, offset_bytes in moving]
        block = HostBlock.filled(pieces, self.device, advance)
        del pieces  # they hold the originals
        for weight, offset_bytes in moving:
            following = self._following(weight)
            weight.move_in(block, offset_bytes)
            for tensor in following if self.rehomed else ():  # the others follow once the device copy goes
                look_at(tensor, self._face(weight))

    def _device_copy(self, weight: StoredWeight, moving: Sequence[StoredWeight]) -> Tensor:
        try:
            copy = torch.empty(weight.nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            total_bytes = sum(each.nbytes for each in moving)
            raise OffloadError(
                f"no room on {self.device} for {total_bytes:,} bytes of resident weights ({weight.name!r} is the first "
                "that does not fit): give k, or free device memory"
            ) from error
        return copy.copy_(weight.host, non_blocking=True)

    def _following(self, weight: StoredWeight) -> list[Tensor]:
        """The tensors that look at the weight now."""
        return [tensor for tensor in self.tensors_of(weight.name) if self._views(tensor, weight)]

    def _point(self, weight: StoredWeight, resident: Tensor | None) -> None:
        """Change where the weight is, and let the tensors that look at it follow."""
        following = [] if self.copies_follow else self._following(weight)
        weight.resident = resident
        for tensor in following:
            look_at(tensor, weight.current)
        self._moved()

    @_locked
    def master_on_host(self) -> None:
        """From now on the homes are what counts: every weight gets one, and the model's tensors look there.

        Raises:
            OffloadError: there is not enough host memory.
        """
        if self.copies_follow:
            return
        self.settle()
        with real_tensors():
            self._make_homes([weight for weight in self.weights.values() if not weight.has_home])
            self.settle()
            copied = [weight for weight in self.weights.values() if weight.resident is not None]
            for weight in copied:
                weight.host.copy_(weight.current)
            following = {weight.name: self._following(weight) for weight in self.weights.values()}
            self.copies_follow = True
            for name, tensors in following.items():
                for tensor in tensors:
                    look_at(tensor, self._face(self.weights[name]))
            for weight in copied:
                self._copied[weight.name] = self.version([weight.name])
        self._moved()

    def as_device_sees(self, owner: object, place: int, view: WeightView, tensor: Tensor) -> Tensor | None:
        """A weight as kernels are to read it where copies follow: its device copy, up to date, or its home.

        Args:
            owner, place: who asks for which of its arguments; the answer is kept for the next time.
            view: how the argument looks at its weight.
            tensor: the argument.

        Returns:
            None where the argument is no weight of this store, or has been given other memory.
        """
        tag = tag_of(tensor)
        if tag is None or tag.store is not self:
            return None
        weight = self.weights[tag.name]
        if weight.resident is None and not weight.has_home:  # placed by no plan: one graph serves several layers
            self.make_offloaded([tag.name])
        self.renew_copy(tag.name)
        views, key = self.views.setdefault(owner, {}), (place, tag.name)
        if key not in views or views[key][0] is not weight.current:
            with real_tensors():
                views[key] = weight.current, view.of(weight.current)
        return views[key][1]

    def renew_copy(self, name: str) -> None:
        """Where copies follow: copy the weight to the device again if it is resident and has changed.

        On the caller's stream. The caller waits for the device before the model's own code may write the weight.
        """
        weight = self.weights[name]
        if weight.resident is None:
            return
        version = self.version([name])
        if self._copied.get(name) != version:
            with real_tensors():
                weight.resident.copy_(weight.host, non_blocking=True)
            self._copied[name] = version

    def write_back(self, name: str) -> None:
        """Where copies follow: a graph has written the device copy of this weight, so its home is written, too."""
        weight = self.weights[name]
        if weight.resident is None:
            return
        with real_tensors():
            weight.host.copy_(weight.resident)
        for tensor in self.tensors_of(name):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        self._copied[name] = self.version([name])

    @_locked
    def settle(self) -> None:
        """Wait for every copy and kernel that may still read or write a weight."""
        self.arena.streams.synchronize()

    @_locked
    def place(self, plan: Plan) -> None:
        """Put the weights where the plan wants them: residents and leftovers on the device, other pages on the host.

        Raises:
            OffloadError: the device has no room for the residents.
        """
        at_home = dict.fromkeys([*plan.mapped, *(interval.page for interval in plan.intervals)])
        staying = [weight for page in plan.residents for weight in plan.pages[page].weights]
        self.make_offloaded(self._own(weight for page in at_home for weight in plan.pages[page].weights))
        self._make_room(plan)
        self.make_resident(self._own([*staying, *plan.leftovers]))

    def _make_room(self, plan: Plan) -> None:
        """Send away what stays for graphs of other parts of the model, as far as a budget has no room for it."""
        if plan.budget_bytes is None:
            return
        mine = {weight.name for weight in (*_weights_of(plan), *plan.leftovers)}
        others = [each for each in self.weights.values() if each.resident is not None and each.name not in mine]
        excess_bytes = sum(each.nbytes for each in others) + plan.peak_bytes() - plan.budget_bytes
        leaving = []
        for weight in sorted(others, key=lambda each: each.nbytes, reverse=True):
            if excess_bytes <= 0:
                break
            leaving.append(weight.name)
            excess_bytes -= weight.nbytes
        self.make_offloaded(leaving)

    def place_again(self, plan: Plan) -> None:
        """`place` for a graph that is about to run, and that one which reads the same pages may have left without its
        residents, or with more of them than its budget allows. That takes as long as the copies of what moves.

        Where no graph reads mostly the same, nothing moves: pieces between graph breaks would send what they share to
        and fro with every iteration.
        """
        read = _weights_of(plan)
        if not any(are_rivals(read, _weights_of(each.plan)) for each in self.runtimes() if each.plan is not plan):
            return
        try:
            self.place(plan)
        except OffloadError as error:
            logger.warning("%s; the device reads these weights in host memory", error)

    def keep(self, names: Sequence[str], room_bytes: float) -> None:
        """Make weights that are at home resident if that leaves no more on the device than so many bytes, and there is
        room for them."""
        if self.device_bytes() + sum(self.weights[name].nbytes for name in names) > room_bytes:
            return
        try:
            self.make_resident(names)
        except OffloadError as error:
            logger.warning("%s; the device reads these weights in host memory", error)

    def beside_bytes_of_others(self, read: Set[Weight]) -> int:
        """Most memory beside weights that graphs of other parts of the model need, next to what this one keeps."""
        others = (each.plan for each in self.runtimes() if not are_rivals(read, _weights_of(each.plan)))
        return max((plan.beside_bytes() for plan in others), default=0)

    def trim_arena(self, compiled_with: Hashable) -> None:
        """Keep no larger arena than the graphs of one torch.compile call need: the options given last count. Graphs of
        an earlier call take their memory again when they run."""
        graphs = (each for each in self.runtimes() if each.compiled_with == compiled_with)
        self.arena.shrink(max((each.plan.arena_bytes for each in graphs), default=0))

    def fits(self, plan: Plan) -> bool:
        """Whether this store has all weights of a plan, which may have been made for another model, and room for its
        pages among the pages that its own graphs have made."""
        mine = set(self.model_weights())
        wanted = {weight for page in plan.pages for weight in page.weights} | set(plan.leftovers)
        page_of = {weight: page for page in self.pages for weight in page.weights}
        names = {page.name: page for page in self.pages}
        return wanted <= mine and all(
            names.get(page.name, page) == page and all(page_of.get(weight, page) == page for weight in page.weights)
            for page in plan.pages
        )

    def _own(self, weights: Iterable[Weight]) -> list[str]:
        return [weight.name for weight in weights if weight.name in self.weights]

    def add_pages(self, pages: Iterable[Page]) -> None:
        """Remember the pages of one more graph."""
        known = {page.name for page in self.pages}
        self.pages.extend(page for page in pages if page.name not in known)

    def resident_pages(self) -> list[str]:
        """Names of the pages that are wholly on the device."""
        return [page.name for page in self.pages if page.weights and all(map(self.is_resident, page.weights))]

    def any_resident(self, page: Page) -> bool:
        """Whether a part of the page has a device copy."""
        return any(map(self.is_resident, page.weights))

    def is_resident(self, weight: Weight) -> bool:
        """Whether the weight has a device copy."""
        return weight.name in self.weights and self.weights[weight.name].resident is not None

    def device_bytes(self) -> int:
        """Device memory that the arena and the resident weights take."""
        residents = (weight.nbytes for weight in self.weights.values() if weight.resident is not None)
        return self.arena.memory.numel() + sum(residents)

    # What copies are made of, and whether they are still good.

    def pieces(self, page: Page) -> tuple[tuple[int, Tensor], ...]:
        """What a copy of the page into a slot consists of: offset in the slot, and the source, uint8.

        Weights that lie one behind the other in a block, as those of a layer do, are one piece.
        """
        if page.name not in self._pieces:
            self._pieces[page.name] = tuple(self._find_pieces(page))
        return self._pieces[page.name]

    def _find_pieces(self, page: Page) -> Iterator[tuple[int, Tensor]]:
        run: _Run | None = None
        for weight, offset_bytes in zip(page.weights, page.offsets_bytes, strict=True):
            stored = self.weights.get(weight.name)
            if stored is None or not stored.nbytes:  # released: its tensors are passed to the graph as they are
                continue
            if stored.resident is not None:  # another graph keeps it on the device
                yield offset_bytes, stored.resident
                continue
            if run is not None and run.continues(stored, offset_bytes):
                run = _Run(run.offset_bytes, run.first, offset_bytes + stored.nbytes - run.offset_bytes)
                continue
            if run is not None:
                yield run.piece()
            run = _Run(offset_bytes, stored, stored.nbytes)
        if run is not None:
            yield run.piece()

    def version(self, names: Iterable[str]) -> Hashable:
        """Changes whenever a copy of one of these weights may have become stale."""
        return self.generation, tuple(version_of(tensor) for name in names for tensor in self.tensors_of(name))

    def touch(self) -> None:
        """Say that any weight may have changed: all copies are stale."""
        self.generation += 1

    # The graphs compiled for the model.

    def add_runtime(self, runtime: object) -> None:
        """Remember the runtime of a graph, as long as the graph lives."""
        self._runtimes.append(weakref.ref(runtime))

    def runtimes(self) -> list[Any]:
        """The runtimes of the graphs that live, in the order in which they were compiled."""
        return [runtime for each in self._runtimes if (runtime := each()) is not None]


@dataclass(frozen=True)
class _Run:
    """Weights that follow each other in a page and, at the same distances, in a block."""

    offset_bytes: int
    first: StoredWeight
    nbytes: int

    def continues(self, stored: StoredWeight, offset_bytes: int) -> bool:
        distance_bytes = stored.offset_bytes - self.first.offset_bytes
        return stored.block is self.first.block and distance_bytes == offset_bytes - self.offset_bytes

    def piece(self) -> tuple[int, Tensor]:
        return self.offset_bytes, self.first.block.host(self.first.offset_bytes, self.nbytes)


def find_store(tensors: Iterable[Tensor]) -> PageStore | None:
    """The store of the first of these tensors that looks at a stored weight."""
    return next((tag.store for tensor in tensors if (tag := tag_of(tensor)) is not None), None)


def _weights_of(plan: Plan) -> frozenset[Weight]:
    return frozenset(weight for page in plan.pages for weight in page.weights)


def are_rivals(one: Set[Weight], other: Set[Weight]) -> bool:
    """Whether two graphs read mostly the same weights: of all that they read, more than half in common."""
    common_bytes = sum(weight.nbytes for weight in one & other)
    return 2 * common_bytes > sum(weight.nbytes for weight in one | other)


def _free_name(name: str, taken: Container[str]) -> str:
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def _report_held(left: list[tuple[str, Tensor]]) -> None:
    """Say so where device memory does not come free because somebody else holds it. Empties the list.

    Args:
        left: names of weights, and the device memory that nothing of this package uses any more.
    """
    held, held_bytes = [], 0
    while left:
        name, memory = left.pop()
        storage = memory.untyped_storage()
        del memory
        # 1 is the variable above. Private, but there is no other way to ask; torch's CUDA graph trees ask like this.
        if storage.nbytes() and torch._C._storage_Use_Count(storage._cdata) > 1:
            held.append(name)
            held_bytes += storage.nbytes()
    if held:
        logger.warning(
            "%s bytes of device memory do not come free although their weights were moved to host memory: somebody "
            "else holds them (%r and %d more). Perhaps another model shares these weights through tensors of its own, "
            "or a state_dict or a view of them is kept",
            f"{held_bytes:,}",
            held[-1],
            len(held) - 1,
        )
