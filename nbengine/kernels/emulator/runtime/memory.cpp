#include "memory.h"

#include <dlfcn.h>

#if defined(__linux__)
#include <link.h>
#endif

namespace nb_emulator {

const char* library_of(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return nullptr;
  return static_cast<const char*>(info.dli_fbase);
}

Memory::Memory(const LaunchRequest& request)
    : request_(request), library_(library_of(reinterpret_cast<void*>(request.thread_main))) {
  if (request.num_variables == 0) return;
  const char* anchor = request.shared_anchor();
  for (uint64_t i = 0; i < request.num_variables; ++i) {
    const SharedVariable& variable = request.variables[i];
    const Buffer place{anchor + variable.from_anchor, variable.bytes};
    if (variable.is_guard) {
      guards_.push_back(place);
      continue;
    }
    shared_.push_back(place);
    starts_.push_back(starts_.back() + variable.bytes);
  }
}

void Memory::locate(Access& access) const {
  const auto inside = [&](const Buffer& buffer) {
    access.offset = static_cast<size_t>(access.address - buffer.begin);
    return access.offset < buffer.bytes && access.bytes <= buffer.bytes - access.offset;
  };
  for (size_t i = 0; i < shared_.size(); ++i) {
    if (!inside(shared_[i])) continue;
    access.space = Access::kShared;
    access.buffer = static_cast<int>(i);
    return;
  }
  for (size_t i = 0; i < request_.num_buffers; ++i) {
    if (!inside(request_.buffers[i])) continue;
    access.space = Access::kGlobal;
    access.buffer = static_cast<int>(i);
    return;
  }
  for (const Buffer& guard : guards_) {
    if (inside(guard)) access.space = Access::kConstant;
  }
  access.offset = 0;
  // Asking the loader takes a microsecond; of constants, the next one is nearby.
  constexpr uintptr_t kPage = 4096;
  const uintptr_t page = reinterpret_cast<uintptr_t>(access.address) / kPage;
  if (page != constant_page_ && library_of(access.address) == library_) constant_page_ = page;
  if (page == constant_page_) access.space = Access::kConstant;
}

bool Memory::is_code(const void* address) const {
#if defined(__linux__)  // the loader may not be asked in a handler; the library's own header tells
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(library_);
  const auto* segment = reinterpret_cast<const ElfW(Phdr)*>(library_ + header->e_phoff);
  const auto at = static_cast<size_t>(static_cast<const char*>(address) - library_);
  for (int i = 0; i < header->e_phnum; ++i, ++segment) {
    if ((segment->p_flags & PF_X) != 0 && at - segment->p_vaddr < segment->p_memsz) return true;
  }
#else
  static_cast<void>(address);
#endif
  return false;
}

int Memory::nearest_shared(const char* address, int64_t* offset) const {
  constexpr int64_t kNear = 256 << 10;
  int found = -1;
  int64_t nearest = kNear;
  for (size_t i = 0; i < shared_.size(); ++i) {
    const int64_t from = address - shared_[i].begin;
    const int64_t past = from - static_cast<int64_t>(shared_[i].bytes);
    const int64_t distance = from < 0 ? -from : past < 0 ? 0 : past + 1;
    if (distance >= nearest) continue;
    nearest = distance;
    found = static_cast<int>(i);
    *offset = from;
  }
  return found;
}

}  // namespace nb_emulator
