"""The receiving DICOM node: verification and storage SCP (PS3.4 A and B), with limits on what senders may use."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from socketserver import BaseServer
from typing import Any

import pydicom
import pynetdicom
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from ensemble.errors import UsageError
from ensemble.hospital.spool import Spool, SpoolFull
from ensemble.readers.dicom.facts import MALFORMED, describe_non_mr_object
from ensemble.serve.limits import RateLimitFilter
from ensemble.text import escape_invisible

log = logging.getLogger(__name__)
log.addFilter(RateLimitFilter())  # of what strangers bring about

#: Of one object, and of one PDU, whatever its header announces.
MAX_OBJECT_BYTES, MAX_PDU_BYTES = 1 << 30, 16 << 20
#: How long a peer may take to ask for an association, and between two messages (beside the quiet time).
_ASSOCIATE_S, _MESSAGE_S = 30.0, 60.0
#: Accepted form of a UID: other vendors' UIDs also have components with leading zeros.
_UID = re.compile(r"[0-9][0-9.]{0,63}")
#: Status of C-STORE (PS3.4 Table B.2-1).
SUCCESS, OUT_OF_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000


@dataclass(frozen=True)
class NodeConfig:
    """Host, port and AE title of the node, and which callers it accepts."""

    aet: str
    host: str
    port: int
    callers: tuple[str, ...] = ()
    """AE titles that may connect; empty allows all."""
    most_associations: int = 16


class DicomNode:
    """Receives DICOM images (C-STORE) into a spool until it is stopped."""

    def __init__(self, address: NodeConfig, spool: Spool, quiet_s: float) -> None:
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # its lines would be strangers' mistakes
        # senders of whole studies also send private objects, and abort if one has no presentation context
        pynetdicom._config.UNRESTRICTED_STORAGE_SERVICE = True
        self._spool = spool
        ae = AE(ae_title=address.aet)
        ae.supported_contexts = []
        ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(context.abstract_syntax or "", pynetdicom.ALL_TRANSFER_SYNTAXES)
        ae.require_called_aet = True
        ae.require_calling_aet = list(address.callers)
        ae.maximum_associations = address.most_associations
        ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = _ASSOCIATE_S, _MESSAGE_S, 2 * quiet_s + _MESSAGE_S
        self._ae = ae

        class Server(ThreadedAssociationServer):
            def verify_request(self, request: Any, client_address: Any) -> bool:
                """Return whether one more connection is accepted, even if only to reject its association."""
                running = sum(isinstance(thread, Association) for thread in threading.enumerate())
                return running < 4 * address.most_associations

        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, _bound),
            (evt.EVT_PDU_RECV, _drop_endless),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_RELEASED, self._released),
            (evt.EVT_ABORTED, self._broken),
            (evt.EVT_CONN_CLOSE, self._broken),
            (evt.EVT_REJECTED, _rejected),
        ]
        try:
            self._server = ae.make_server((address.host, address.port), evt_handlers=handlers, server_class=Server)
        except (OSError, OverflowError) as error:
            raise UsageError(
                "the port can't be opened",
                where=f"{address.host}:{address.port}",
                found=getattr(error, "strerror", None) or str(error),
                do="stop the program that uses it, or choose another port with --port",
            ) from error
        assert self._server.socket is not None
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="dicom", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop receiving; open associations are aborted, and their senders will send again."""
        BaseServer.shutdown(self._server)
        self._server.server_close()
        self._ae.shutdown()

    def _store(self, event: Any) -> int:
        """Store an MR image; other objects are accepted but not kept. Success means that the image is on disk."""
        try:
            content = event.encoded_dataset()
            head = pydicom.dcmread(
                io.BytesIO(content),
                stop_before_pixels=True,
                specific_tags=["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"],
            )
            study, instance = str(head.get("StudyInstanceUID") or ""), str(head.get("SOPInstanceUID") or "")
            kind = describe_non_mr_object(str(head.get("SOPClassUID") or ""))
        except MALFORMED:
            return NOT_UNDERSTOOD
        if not (_UID.fullmatch(study) and instance):
            return NOT_UNDERSTOOD
        try:
            if kind:
                self._spool.pass_over(study, id(event.assoc))
            else:
                self._spool.keep(study, instance, content, id(event.assoc))
        except SpoolFull as error:
            log.warning("an image was rejected, because the spool is full (%s)", error)
            return OUT_OF_RESOURCES
        except OSError as error:
            log.error("an image was rejected, because it can't be written (%s)", error.strerror or error)
            return OUT_OF_RESOURCES
        return SUCCESS

    def _released(self, event: Any) -> None:
        self._spool.end_of(id(event.assoc), released=True)

    def _broken(self, event: Any) -> None:
        self._spool.end_of(id(event.assoc), released=False)


def _bound(event: Any) -> None:
    """Limit the length of a PDU: pynetdicom reads whatever length a header announces."""
    socket = event.assoc.dul.socket
    receive = socket.recv
    socket.recv = lambda count: receive(count) if count <= MAX_PDU_BYTES else bytearray()


def _drop_endless(event: Any) -> None:
    """Abort an association whose object exceeds the size limit."""
    message = event.assoc.dimse.message
    if message is not None and message.data_set is not None and message.data_set.tell() > MAX_OBJECT_BYTES:
        log.warning("an association was aborted, because an object exceeded %d bytes", MAX_OBJECT_BYTES)
        event.assoc.dul.socket.close()


def _rejected(event: Any) -> None:
    calling = event.assoc.requestor.ae_title or ""
    log.warning("an association was rejected: calling AE title '%s'", escape_invisible(str(calling)))


def storage_contexts(classes: Sequence[str]) -> list[Any]:
    """Return the presentation contexts for objects of these SOP classes."""
    return [pynetdicom.build_context(sop_class) for sop_class in dict.fromkeys(classes)]
