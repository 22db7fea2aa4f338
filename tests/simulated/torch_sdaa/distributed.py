"""The collectives `tccl`: Gloo's, over the memory that stands for the devices'."""

import torch
import torch.distributed as dist


class _Tccl(dist.ProcessGroup):
    _name = "tccl_world"

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._used = []

    def _host(self, tensors):
        """The CPU tensors with the same memory.

        They live until the next call: else Gloo's thread would have to free Python's objects, for which it needs the
        interpreter's lock, while who destroys the group holds the lock and waits for the thread.
        """
        for tensor in tensors:
            if tensor.device.type != "sdaa":
                raise RuntimeError(f"tccl: found a tensor on {tensor.device}, expected sdaa")
        host = [torch.ops.simulated_sdaa.host(tensor) for tensor in tensors]
        self._used = [host, *self._used[:63]]  # several collectives may be under way
        return host

    def getBackendName(self):
        return "tccl"

    def getGroupName(self):
        return self._name

    def setGroupName(self, name):
        self._name = name

    group_name = pg_name = property(getGroupName)

    def allreduce(self, tensors, options=None):
        return self._gloo.allreduce(self._host(tensors), options or dist.AllreduceOptions())

    def broadcast(self, tensors, options):
        return self._gloo.broadcast(self._host(tensors), options)

    def allgather(self, outputs, inputs, options=None):
        return self._gloo.allgather([self._host(each) for each in outputs], self._host(inputs))

    def _allgather_base(self, output, input, options=None):
        return self._gloo._allgather_base(*self._host([output, input]), options or dist.AllgatherOptions())

    def _reduce_scatter_base(self, output, input, options=None):
        return self._gloo._reduce_scatter_base(*self._host([output, input]), options or dist.ReduceScatterOptions())

    # as torch 2.13 calls them
    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base

    def barrier(self, opts=None):
        return self._gloo.barrier()

    def shutdown(self):
        """torch 2.13 calls it when the group is destroyed; Gloo ends with its object."""


if dist.is_available():
    dist.Backend.register_backend("tccl", _Tccl, devices=["sdaa"])
