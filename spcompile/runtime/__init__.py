"""What happens while a model runs: host memory, the weights in it, the arena, the streams and the copies.

* ``host``: blocks of host memory that the compute device can read, and how much host memory there is;
* ``store``: the weights of an offloaded model, each in a block or, while it is resident, in a device copy;
* ``arena``: the device block whose slots streamed pages pass through;
* ``streams``: the compute stream, the copy stream and the waits between them, on a GPU and on the emulated device;
* ``transfers``: what the prefetch, load and evict nodes of one outer graph do;
* ``emulated``: runs an outer graph on the emulated device.

The state of a model lives as long as its tensors do: a tensor carries a tag, the tag holds the store, and nothing here
holds a tensor of the model. So when the model dies its memory goes back at once, without a garbage collection.
"""
