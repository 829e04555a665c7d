# MLX's Python module shares nanobind's type registry with this extension, so both must be built with the same nanobind
# internals. A mismatch builds, links and loads, and then every call raises a TypeError. Checked here instead.
# The first row is the one that pyproject.toml pins.
set(MLX_NANOBIND_TABLE
    "0.32.2=2.15.0"
    "0.32.4=3.1.0"
)

function(check_versions mlx_version nanobind_version)
  set(supported "")
  foreach(row IN LISTS MLX_NANOBIND_TABLE)
    string(REPLACE "=" ";" pair "${row}")
    list(GET pair 0 mlx)
    list(GET pair 1 nanobind)
    list(APPEND supported "mlx ${mlx} with nanobind ${nanobind}")
    if(mlx VERSION_EQUAL mlx_version)
      if(nanobind VERSION_EQUAL nanobind_version)
        return()
      endif()
      message(FATAL_ERROR
        "nanobind does not match MLX.\n"
        "  found:  nanobind ${nanobind_version}, mlx ${mlx_version}\n"
        "  needed: nanobind ${nanobind} (the one that mlx ${mlx} was built with)\n"
        "  fix:    ${Python_EXECUTABLE} -m pip install nanobind==${nanobind}")
    endif()
  endforeach()
  list(GET MLX_NANOBIND_TABLE 0 pinned)
  string(REPLACE "=" ";" pair "${pinned}")
  list(GET pair 0 mlx)
  list(GET pair 1 nanobind)
  list(JOIN supported "; " supported)
  message(FATAL_ERROR
    "This MLX is not in cmake/versions.cmake.\n"
    "  found:  mlx ${mlx_version}, nanobind ${nanobind_version}\n"
    "  needed: ${supported}\n"
    "  fix:    ${Python_EXECUTABLE} -m pip install mlx==${mlx} nanobind==${nanobind}")
endfunction()
