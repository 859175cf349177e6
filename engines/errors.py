"""What can go wrong in the compute rooms, free of torch so that the front can import it."""

from __future__ import annotations


class EngineError(Exception):
    """A request that the engine could not carry out; the engine itself is fine."""


class NoFreeSlot(EngineError):
    """Every style slot is worn by a running request; the same request succeeds once one of them ends."""


class ModelError(EngineError):
    """A model that cannot be served; the message names what is missing, or the setting that is wrong."""


class EngineCacheError(EngineError):
    """The folder of compiled engines cannot be used; the message names it, the setting and what to do."""


class SettingError(EngineError):
    """A setting of a training that is wrong; the message names it and what is allowed."""


class OutOfMemory(EngineError):
    """The device or the host has too little memory for the request."""


class CoreDied(EngineError):
    """The engine core's process ended, or never became ready."""


class EngineFault(EngineError):
    """The engine failed in a way that is not the request's fault."""


class RanksLost(EngineFault):
    """The ranks that share a model's work are out of step, or one of them is gone; none can go on."""
