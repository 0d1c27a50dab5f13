"""What happens while a model runs: host memory, the weights in it, the arena, the streams and the copies.

* ``host``: blocks of host memory that the compute device can read, and how much host memory there is;
* ``weights``: what a weight is, and how tensors look at it;
* ``store``: the weights of one model, each in a block or, while it is resident, in a device copy;
* ``arena``: the device block whose slots streamed pages pass through;
* ``streams``: the compute stream, the copy streams and the waits between them, on a GPU and on the emulated device;
* ``transfers``: what the prefetch, load, evict and send nodes of one outer graph do;
* ``compiled_graph``: the function that AOTAutograd calls: finds the store of its arguments and runs the outer graph;
* ``gradients``: host memory that gradients are sent to;
* ``hosted``: parameters on the host over the weights, for optimizers there; ``optimizers``: what happens around steps;
* ``emulated``: runs an outer graph on the emulated device;
* ``recording``: what really happened, and when; ``measure``: how fast the machine is.

The state of a model lives as long as its tensors do: a tensor carries a tag, the tag holds the store, and nothing here
holds a tensor of the model. So when the model dies its memory goes back at once, without a garbage collection.
"""
