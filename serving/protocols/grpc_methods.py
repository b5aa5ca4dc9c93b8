"""The methods that Ray Serve looks for on the class that it makes replicas of: one for each call of
the protocol, by its name. Imports nothing, because that class is known where nothing is answered.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.protocols.grpc_calls import GrpcCalls


class GrpcMethods:
    """Passes each call on with its name."""

    _grpc: "GrpcCalls"

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("ServerLive", request, grpc_context)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("ServerReady", request, grpc_context)

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("ServerMetadata", request, grpc_context)

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("ModelReady", request, grpc_context)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("ModelMetadata", request, grpc_context)

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("ModelInfer", request, grpc_context)

    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("RepositoryIndex", request, grpc_context)

    async def RepositoryModelLoad(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("RepositoryModelLoad", request, grpc_context)

    async def RepositoryModelUnload(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("RepositoryModelUnload", request, grpc_context)
